"""A network as Python code that rebuilds it: what a failing check prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

import pcsim
from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import LearningRule
from pcsim.graph.edge import Edge
from pcsim.graph.energy import Gaussian
from pcsim.graph.network import Network
from pcsim.graph.node import Node, Sum
from pcsim.simulator import Clamps
from pcsim.verify.case import SeededNetwork

LONGEST_TENSOR = 64
"""Tensors with more numbers are printed by their shape alone."""


def code_of(
    network: Network,
    clamps: Clamps | None = None,
    relaxation: Relaxation | None = None,
    rule: LearningRule | None = None,
) -> str:
    """Python code that rebuilds a network, and what is run on it.

    Modules are written by their repr, one that is used twice by a name. Weights are rebuilt where they come from a
    seed (:class:`SeededNetwork`); elsewhere a comment says that they are missing.

    Args:
        network: the graph.
        clamps: what is given.
        relaxation: how the free nodes move.
        rule: how the weights learn.
    """
    shared = _shared_modules(network)
    seeded = isinstance(network, SeededNetwork) and network.weight_seed is not None
    lines = ["import torch", "import pcsim", "import pcsim.verify", "from torch import nn, tensor", ""]
    lines += [f"{name} = {module_code(module)}" for module, name in shared.items()]
    lines.append(f"net = {'pcsim.verify.SeededNetwork' if seeded else 'pcsim.Network'}()")
    lines += [_node_code(node, shared) for node in network.nodes.values()]
    lines += [_edge_code(edge, shared) for edge in network.edges.values()]
    dtype = next((p.dtype for p in (*network.parameters(), *network.buffers()) if p.is_floating_point()), None)
    if dtype is not None:
        lines.append(f"net.to({dtype})")
    if isinstance(network, SeededNetwork) and network.weight_seed is not None:
        lines.append(f"net.seed_weights({network.weight_seed})")
    elif any(True for _ in network.parameters()):
        lines.append("# the weights are those of the given network; none of them is written here")
    if clamps is not None:
        given = (f"    {_name(node)!r}: {_clamp_code(clamp)}," for node, clamp in clamps.items())
        lines += ["clamps = {", *given, "}"]
    if relaxation is not None:
        lines.append(f"relaxation = {_in_pcsim(relaxation)}")
    if rule is not None:
        lines.append(f"rule = {_in_pcsim(rule)}")
    return "\n".join(lines)


def module_code(module: nn.Module) -> str:
    """An expression that builds a module like this one, weights aside."""
    if isinstance(module, nn.Sequential):
        return f"nn.Sequential({', '.join(module_code(child) for child in module)})"
    written = " ".join(repr(module).split())
    kind = type(module)
    if getattr(nn, kind.__name__, None) is kind:
        return f"nn.{written}"
    if getattr(pcsim, kind.__name__, None) is kind:
        return f"pcsim.{written}"
    return f"{kind.__module__}.{written}"


def _shared_modules(network: Network) -> dict[nn.Module, str]:
    uses = Counter(module for part in _parts(network) for module in part)
    shared = [module for module, count in uses.items() if count > 1]
    return {module: f"shared{number}" for number, module in enumerate(shared, start=1)}


def _parts(network: Network) -> list[list[nn.Module]]:
    nodes = [[node.transfer, node.combine] for node in network.nodes.values()]
    return nodes + [[edge.module] for edge in network.edges.values()]


def _node_code(node: Node, shared: Mapping[nn.Module, str]) -> str:
    said = [repr(node.name), repr(node.shape)]
    if not isinstance(node.transfer, nn.Identity):
        said.append(f"transfer={shared.get(node.transfer) or module_code(node.transfer)}")
    if type(node.combine) is not Sum:
        said.append(f"combine={shared.get(node.combine) or module_code(node.combine)}")
    if type(node.energy_function) is not Gaussian:
        said.append(f"energy={_in_pcsim(node.energy_function)}")
    if node.weight != 1:
        said.append(f"weight={node.weight!r}")
    if node.log_precision is not None:
        per_unit = "per_unit=True" if node.log_precision.dim() else ""
        said.append(f"precision=pcsim.LearnedPrecision({per_unit})")
    elif isinstance(node.given_precision, Tensor):
        said.append(f"precision={_tensor_code(node.given_precision)}")
    elif node.given_precision != 1:
        said.append(f"precision={node.given_precision!r}")
    if node.deterministic:
        said.append("deterministic=True")
    if node.prior is not None:
        written = _tensor_code(node.prior)
        said.append(f"prior=nn.Parameter({written})" if isinstance(node.prior, nn.Parameter) else f"prior={written}")
    return f"net.add_node({', '.join(said)})"


def _edge_code(edge: Edge, shared: Mapping[nn.Module, str]) -> str:
    said = [repr(edge.source_name), repr(edge.target_name), shared.get(edge.module) or module_code(edge.module)]
    if edge.gain != 1:
        said.append(f"gain={edge.gain!r}")
    return f"net.add_edge({', '.join(said)}, name={edge.name!r})"


def _tensor_code(tensor: Tensor) -> str:
    if tensor.numel() > LONGEST_TENSOR:
        return f"torch.zeros({tuple(tensor.shape)}, dtype={tensor.dtype})  # its values are not written here"
    return f"tensor({tensor.tolist()!r}, dtype={tensor.dtype})"


def _clamp_code(given: Tensor | tuple[Tensor, Tensor]) -> str:
    if isinstance(given, tuple):
        return f"({_tensor_code(given[0])}, {_tensor_code(given[1])})"
    return _tensor_code(given)


def _name(node: Node | str) -> str:
    return node if isinstance(node, str) else node.name


def _in_pcsim(setting: object) -> str:
    """The repr of a setting, its own class and the schedule inside it found in pcsim."""
    written = repr(setting)
    inner = getattr(setting, "precision", None)
    if inner is not None and type(inner).__module__.startswith("pcsim."):
        written = written.replace(f"precision={inner!r}", f"precision=pcsim.{inner!r}")
    return f"pcsim.{written}" if type(setting).__module__.startswith("pcsim.") else written
