"""Property-based verification that users can point at their own nodes, edges, graphs and engines.

It needs hypothesis (``pip install pcsim[verify]``), which the rest of the package does not.

Example:
    >>> from hypothesis import given
    >>> from pcsim import verify
    >>> @given(verify.cases(verify.networks(edge_factory=my_edges), momentum=False))
    ... def test_my_edges(case):
    ...     verify.check_gradients(case.network, case.clamps, case.relaxation)
"""

from pcsim.verify.agreement import check_engines_agree
from pcsim.verify.case import Case, NamedClamps, SeededNetwork
from pcsim.verify.descent import check_descent
from pcsim.verify.gradients import check_gradients
from pcsim.verify.kernels import check_kernel
from pcsim.verify.locality import check_locality
from pcsim.verify.oracle import brute_force_levels, total_energy
from pcsim.verify.recording import RecordingOptimizer
from pcsim.verify.source import code_of
from pcsim.verify.strategies import (
    RULES,
    cases,
    clamps,
    edge_modules,
    linear_edge_modules,
    linear_node_options,
    networks,
    node_options,
    precisions,
    relaxations,
    schedules,
    shapes,
    transfers,
)

__all__ = [
    "RULES",
    "Case",
    "NamedClamps",
    "RecordingOptimizer",
    "SeededNetwork",
    "brute_force_levels",
    "cases",
    "check_descent",
    "check_engines_agree",
    "check_gradients",
    "check_kernel",
    "check_locality",
    "clamps",
    "code_of",
    "edge_modules",
    "linear_edge_modules",
    "linear_node_options",
    "networks",
    "node_options",
    "precisions",
    "relaxations",
    "schedules",
    "shapes",
    "total_energy",
    "transfers",
]
