"""A network as Python code that rebuilds it: what a failing check prints."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pcsim.clamps import Clamps, Given, Stream
from pcsim.dynamics.inference import Relaxation
from pcsim.dynamics.learning import LearningRule
from pcsim.graph.combining import Sum
from pcsim.graph.edge import Edge
from pcsim.graph.energy import Gaussian
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.verify.case import SeededNetwork
from pcsim.verify.writing import Unwritten, Writer

MOST_WEIGHTS = 500
"""Parameters and buffers with more numbers in all are not written, unless they come from a seed."""


def code_of(
    network: Network,
    clamps: Clamps | None = None,
    relaxation: Relaxation | None = None,
    rule: LearningRule | None = None,
) -> str:
    """Python code that rebuilds a network, and what is run on it.

    Modules, energies, schedules and rules of a user's own are imported from where they were defined, and built by the
    arguments that their attributes or their repr tell; a module that is used twice gets a name. Weights are rebuilt
    from their seed (:class:`SeededNetwork`), or written number by number where they are few. What cannot be written is
    said in a comment.

    Args:
        network: the graph.
        clamps: what is given.
        relaxation: how the free nodes move.
        rule: how the weights learn.
    """
    writer = Writer()
    shared = _shared_modules(network)
    seeded = _seed_of(network) is not None
    lines = [f"{name} = {writer.thing(module)}" for module, name in shared.items()]
    lines.append(f"net = {'pcsim.verify.SeededNetwork' if seeded else 'pcsim.Network'}()")
    lines += [_node_code(node, shared, writer) for node in network.nodes.values()]
    lines += [_edge_code(edge, shared, writer) for edge in network.edges.values()]
    lines += _weights_code(network, writer)
    if clamps is not None:
        given = (f"    {_name(node)!r}: {_clamp_code(clamp, writer)}," for node, clamp in clamps.items())
        lines += ["clamps = {", *given, "}"]
    if relaxation is not None:
        lines.append(f"relaxation = {writer.thing(relaxation)}")
    if rule is not None:
        lines.append(f"rule = {writer.thing(rule)}")
    head = ["import torch", "import pcsim", "import pcsim.verify", "from torch import nn, tensor"]
    return "\n".join([*head, *writer.imports, *writer.notes, "", *lines])


def call_code(call: str, settings: Mapping[str, object]) -> str:
    """A call with keyword arguments, as code; what they need to be imported stands before it.

    Args:
        call: the function and its first arguments, without the closing parenthesis.
        settings: further arguments, by name: numbers, texts, tuples, classes, functions or objects.
    """
    writer = Writer()
    written = [f"{name}={_setting_code(name, setting, writer)}" for name, setting in settings.items()]
    return "\n".join([*writer.imports, *writer.notes, f"{', '.join([call, *written])})"])


def _setting_code(name: str, setting: object, writer: Writer) -> str:
    try:
        return writer.value(setting)
    except Unwritten:
        writer.notes[f"# {name}: put its definition here, {setting!r}"] = None
        return name


def _seed_of(network: Network) -> int | None:
    """The seed that all weights come from, if they are still what they were drawn as."""
    if not isinstance(network, SeededNetwork) or network.weight_seed is None:
        return None
    again = copy.deepcopy(network)
    again.seed_weights(network.weight_seed)
    same = all(torch.equal(new, old) for new, old in zip(again.parameters(), network.parameters(), strict=True))
    return network.weight_seed if same else None


def _weights_code(network: Network, writer: Writer) -> list[str]:
    tensors = [*network.parameters(), *network.buffers()]
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
    lines = [] if dtype is None else [f"net.to({dtype})"]
    seed = _seed_of(network)
    if seed is not None:
        lines.append(f"net.seed_weights({seed})")
    elif any(True for _ in network.parameters()):
        if sum(tensor.numel() for tensor in tensors) <= MOST_WEIGHTS:
            state = network.state_dict()
            written = (
                f"    {name!r}: {_whole(tensor)}," for name, tensor in state.items() if isinstance(tensor, Tensor)
            )
            lines += ["weights = {", *written, "}", "net.load_state_dict(weights)"]
        else:
            lines.append("# the weights are those of the given network; none of them is written here")
    return lines


def _whole(tensor: Tensor) -> str:
    return f"tensor({tensor.tolist()!r}, dtype={tensor.dtype})"


def _shared_modules(network: Network) -> dict[nn.Module, str]:
    uses = Counter(module for part in _parts(network) for module in part)
    shared = [module for module, count in uses.items() if count > 1]
    return {module: f"shared{number}" for number, module in enumerate(shared, start=1)}


def _parts(network: Network) -> list[list[nn.Module]]:
    nodes = [[node.transfer, node.combine] for node in network.nodes.values()]
    return nodes + [[edge.module] for edge in network.edges.values()]


def _node_code(node: Node, shared: Mapping[nn.Module, str], writer: Writer) -> str:
    said = [repr(node.name), repr(node.shape)]
    if not isinstance(node.transfer, nn.Identity):
        said.append(f"transfer={shared.get(node.transfer) or writer.thing(node.transfer)}")
    if type(node.combine) is not Sum:
        said.append(f"combine={shared.get(node.combine) or writer.thing(node.combine)}")
    if type(node.energy_function) is not Gaussian:
        said.append(f"energy={writer.thing(node.energy_function)}")
    if node.energy_weight != 1:
        said.append(f"energy_weight={node.energy_weight!r}")
    if node.log_precision is not None:
        per_unit = "per_unit=True" if node.log_precision.dim() else ""
        said.append(f"precision=pcsim.LearnedPrecision({per_unit})")
    elif isinstance(node.own_precision, Tensor):
        said.append(f"precision={writer.tensor(node.own_precision)}")
    elif node.own_precision != 1:
        said.append(f"precision={node.own_precision!r}")
    if node.deterministic:
        said.append("deterministic=True")
    if node.prior is not None:
        written = writer.tensor(node.prior)
        said.append(f"prior=nn.Parameter({written})" if isinstance(node.prior, nn.Parameter) else f"prior={written}")
    if node.constant is not None:
        said.append(f"constant={node.constant!r}")
    return f"net.add_node({', '.join(said)})"


def _edge_code(edge: Edge, shared: Mapping[nn.Module, str], writer: Writer) -> str:
    said = [repr(edge.source_name), repr(edge.target_name), shared.get(edge.module) or writer.thing(edge.module)]
    if edge.gain != 1:
        said.append(f"gain={edge.gain!r}")
    return f"net.add_edge({', '.join(said)}, name={edge.name!r})"


def _clamp_code(given: Given, writer: Writer) -> str:
    if isinstance(given, tuple):
        return f"({_clamp_code(given[0], writer)}, {writer.tensor(given[1])})"
    if isinstance(given, Stream):
        frames = writer.tensor(given.frames) if isinstance(given.frames, Tensor) else writer.value(given.frames)
        return f"pcsim.Stream({frames}, every={given.every})"
    return writer.tensor(given)


def _name(node: Node | str) -> str:
    return node if isinstance(node, str) else node.name
