"""Property-based verification that users can point at their own nodes, edges, graphs and engines.

Each check takes one network (:func:`check_gradients`, :func:`check_locality`, :func:`check_descent`), one case
(:func:`check_engines_agree`), one module (:func:`check_kernel`), energy (:func:`check_energy`) or schedule
(:func:`check_schedule`), and raises AssertionError with the smallest network
found that fails, as code that fails again when it is run. The network, its modes and gradients and the random state
stay as they were. With hypothesis, :func:`networks` makes random graphs from a user's own factories of nodes and edges,
:func:`own_networks` gives a user's own network other weights, and :func:`cases` clamps and relaxes them at random.
Where a test's settings leave out hypothesis' ``Phase.shrink``, the checks themselves look for the smallest network
there too, which is quicker. It needs hypothesis (``pip install pcsim[verify]``), which the rest of the package does
not.

Example:
    >>> from hypothesis import given
    >>> from pcsim import verify
    >>> @given(verify.cases(verify.networks(edge_factory=my_edges), momentum=False))
    ... def test_my_edges(case):
    ...     verify.check_gradients(case.network, case.clamps, case.relaxation)
"""

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError("pcsim.verify needs hypothesis: pip install 'pcsim[verify]'") from error

from pcsim.verify.agreement import check_engines_agree
from pcsim.verify.backprop import check_backprop_agreement
from pcsim.verify.case import Case, NamedClamps, SeededNetwork
from pcsim.verify.declarations import check_energy, check_schedule
from pcsim.verify.descent import check_descent
from pcsim.verify.gradients import check_gradients
from pcsim.verify.kernels import check_kernel
from pcsim.verify.locality import check_locality
from pcsim.verify.oracle import brute_force_levels, total_energy
from pcsim.verify.parts import (
    edge_modules,
    linear_edge_modules,
    linear_node_options,
    node_options,
    precisions,
    shapes,
    transfers,
)
from pcsim.verify.recording import RecordingOptimizer
from pcsim.verify.shrinking import smallest
from pcsim.verify.source import code_of
from pcsim.verify.strategies import RULES, cases, clamps, networks, own_networks, relaxations, schedules

__all__ = [
    "RULES",
    "Case",
    "NamedClamps",
    "RecordingOptimizer",
    "SeededNetwork",
    "brute_force_levels",
    "cases",
    "check_backprop_agreement",
    "check_descent",
    "check_energy",
    "check_engines_agree",
    "check_gradients",
    "check_kernel",
    "check_locality",
    "check_schedule",
    "clamps",
    "code_of",
    "edge_modules",
    "linear_edge_modules",
    "linear_node_options",
    "networks",
    "node_options",
    "own_networks",
    "precisions",
    "relaxations",
    "schedules",
    "shapes",
    "smallest",
    "total_energy",
    "transfers",
]
