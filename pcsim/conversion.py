"""From a PyTorch model to a network that shares its modules, and from a network to its forward pass as a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import cast

import attrs
import networkx as nx
import torch
from torch import Tensor, nn
from torch.nn.modules import (
    activation,
    batchnorm,
    channelshuffle,
    dropout,
    flatten,
    fold,
    instancenorm,
    normalization,
    padding,
    pixelshuffle,
    pooling,
    upsampling,
)
from torch.nn.parameter import is_lazy

from pcsim.errors import ClampError, GraphError
from pcsim.graph.edge import Edge
from pcsim.graph.energy import Energy
from pcsim.graph.levels import simple_graph
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.graph.probing import PROBE_BATCH, probe, tensor_options, zeros_for

Kinds = tuple[type[nn.Module], ...]


def _kinds(*modules: ModuleType) -> Kinds:
    return tuple(getattr(module, name) for module in modules for name in module.__all__)


NONLINEARITIES: Kinds = tuple(kind for kind in _kinds(activation) if kind is not nn.MultiheadAttention)
"""What counts as a nonlinearity: every activation of ``torch.nn``, softmax among them."""

STAYING: Kinds = _kinds(batchnorm, instancenorm, normalization, pooling, dropout)
"""What stays with the nonlinearity that it follows: normalisation, pooling, dropout."""

PREPARING: Kinds = (nn.Identity, *_kinds(flatten, padding, upsampling, pixelshuffle, channelshuffle, fold))
"""What brings a value into the form that the next layer reads: flattening, padding, resizing, reordering."""


def from_sequential(
    model: nn.Sequential,
    *,
    input_shape: Sequence[int],
    latents: Sequence[str | int] | Mapping[str | int, str] | None = None,
    nonlinearities: Sequence[type[nn.Module]] = (),
    energy: Energy | None = None,
) -> Network:
    """A chain of nodes with the layers of a model between them; it shares the model's modules and parameters.

    Sequentials inside the model are taken apart. Between two nodes the edge's module is all up to the last layer with
    a map of its own (a linear map, a convolution, any module of your own), and what follows it, normalisation,
    nonlinearity, pooling and the like, is the node's transfer, as in :func:`pcsim.topologies.vgg`; without such a
    layer the edge is the identity. So ``Simulator.predict`` gives what the model gives in evaluation mode, and
    training the network trains the model.

    By default two maps have a latent between them where a nonlinearity (:data:`NONLINEARITIES`) is. It is placed after
    the nonlinearity and the normalisation, pooling and dropout that follow; flattening, padding and resizing after it
    belong to the next edge. What comes after the last latent predicts the node "output", with its nonlinearity if it
    ends in one.

    Layers of ``torch.nn`` that work in place are told not to (``inplace = False``), since they would overwrite a
    latent; the model computes the same as before.

    Args:
        model: what to convert; it keeps its mode (training or evaluation).
        input_shape: of the node "input", the batch axis left out.
        latents: layers that are followed by a latent, by their names in the model ("conv1", "features.3") or their
            places in it (of its direct children; a negative one counts from the end). The node is called as the layer,
            with "/" for ".", or "hidden1", "hidden2", ... where the layer has only a number; a mapping from layers to
            names of nodes calls them otherwise. None places them by the rule above and calls them "hidden1", ....
        nonlinearities: classes of your own that count as nonlinearities.
        energy: of the node "output"; Gaussian by default.

    Raises:
        GraphError: the model is no plain Sequential, or holds nothing or uninitialised parameters; a layer does not
            fit the input's shape, or overwrites what it reads; a latent is unknown, given twice, or the last layer.
    """
    layers = _layers(model)
    names, modules = [layer.name for layer in layers], [layer.module for layer in layers]
    nonlinear = (*NONLINEARITIES, *nonlinearities)
    if latents is None:
        called = {place: f"hidden{k}" for k, place in enumerate(_default_places(modules, nonlinear), start=1)}
    else:
        called = _named_places(model, names, latents)
    modes = {module: module.training for module in model.modules()}
    in_place = [
        module
        for module in modules
        if getattr(module, "inplace", False) and isinstance(module, (*NONLINEARITIES, *_kinds(dropout)))
    ]
    net = Network()
    try:
        for module in in_place:
            module.inplace = False  # type: ignore[assignment]
        previous, start = net.add_node("input", input_shape), 0
        shapes = _shapes(layers, previous.shape, in_place=(*nonlinear, *_kinds(dropout)))
        for place in (*sorted(called), len(layers) - 1):
            last = place == len(layers) - 1
            part, start = modules[start : place + 1], place + 1
            split = _end_of_map(part, nonlinear)
            node = net.add_node(
                "output" if last else called[place],
                shapes[place],
                transfer=_joined(part[split:]),
                energy=energy if last else None,
            )
            net.add_edge(previous, node, _joined(part[:split]))
            previous = node
    except BaseException:
        for module in in_place:
            module.inplace = True  # type: ignore[assignment]
        raise
    for own in net.modules():
        if own not in modes:  # nodes, edges and what holds them
            own.training = model.training
    for module, mode in modes.items():
        if module.training != mode:
            module.train(mode)
    return net


@attrs.frozen(eq=False)
class _Layer:
    """A module of the model that is not taken apart any further, and its name in the model."""

    name: str
    module: nn.Module

    def __str__(self) -> str:
        return f"layer {self.name!r} ({self.module!r})"


def _layers(model: nn.Sequential) -> list[_Layer]:
    if not isinstance(model, nn.Sequential) or not _is_plain(model):
        why = "with hooks or a forward of its own" if isinstance(model, nn.Sequential) else "no nn.Sequential"
        raise GraphError(
            f"from_sequential: {type(model).__name__} given, {why}, expected a plain nn.Sequential; build the graph "
            "with Network.add_node and add_edge, whose edges carry any module"
        )
    if not len(model):
        raise GraphError("from_sequential: the model holds no module; give one with at least one layer")
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise GraphError(f"from_sequential: {lazy[0]!r} has no shape yet; run the model once before it is converted")
    return list(_flattened(model, ""))


def _flattened(model: nn.Sequential, prefix: str) -> Iterator[_Layer]:
    for name, child in model._modules.items():  # named_children would leave out a module that comes a second time
        if isinstance(child, nn.Sequential) and len(child) and _is_plain(child):
            yield from _flattened(child, f"{prefix}{name}.")
        elif child is not None:
            yield _Layer(f"{prefix}{name}", child)


def _is_plain(model: nn.Sequential) -> bool:
    """Whether a Sequential does nothing but call its children."""
    hooks = (model._forward_hooks, model._forward_pre_hooks, model._backward_hooks, model._backward_pre_hooks)
    return type(model).forward is nn.Sequential.forward and "forward" not in vars(model) and not any(hooks)


def _default_places(modules: Sequence[nn.Module], nonlinear: Kinds) -> list[int]:
    places, last = [], None
    mapped = False
    for place, module in enumerate(modules):
        if isinstance(module, nonlinear):
            last = place if mapped else None
        elif isinstance(module, STAYING):
            last = last if last is None else place
        elif not isinstance(module, PREPARING):
            places += [] if last is None else [last]
            mapped, last = True, None
    return places


def _named_places(
    model: nn.Sequential, names: Sequence[str], latents: Sequence[str | int] | Mapping[str | int, str]
) -> dict[int, str]:
    """Names of latent nodes by the place of the layer that they follow."""
    if isinstance(latents, str):
        raise GraphError(f"from_sequential: latents={latents!r} given, expected a list of layers")
    children = list(model._modules)
    found: dict[int, str | None] = {}
    for latent in latents:
        layer = latent
        if isinstance(latent, int) and -len(children) <= latent < len(children):
            layer = children[latent]
        inside = [place for place, name in enumerate(names) if name == layer or name.startswith(f"{layer}.")]
        if not inside:
            raise GraphError(
                f"from_sequential: latents: the model has no layer {latent!r}; its layers are {', '.join(names)}"
            )
        place = inside[-1]
        if place == len(names) - 1:
            raise GraphError(
                f"from_sequential: latents: {latent!r} is the last layer, which predicts the node 'output'; leave it "
                "out"
            )
        if place in found:
            raise GraphError(f"from_sequential: latents: {latent!r} is a place that another one gave; give it once")
        if isinstance(latents, Mapping):
            found[place] = latents[latent]
        else:
            found[place] = None if str(layer).replace(".", "").isdigit() else str(layer).replace(".", "/")
    return {place: found[place] or f"hidden{k}" for k, place in enumerate(sorted(found), start=1)}


def _shapes(layers: Sequence[_Layer], shape: tuple[int, ...], in_place: Kinds) -> list[tuple[int, ...]]:
    """What each layer gives, without the batch axis; run once on zeros."""
    dtype, device = tensor_options(*(layer.module for layer in layers))
    value = zeros_for(layers[0].module, shape, dtype, device)
    shapes = []
    for layer in layers:
        version = value._version
        given = f"(batch, {', '.join(map(str, value.shape[1:]))})"
        try:
            output = probe(layer.module, [value])
        except Exception as problem:
            raise GraphError(
                f"from_sequential: {layer} does not accept {given}, which input_shape {shape} leads to: {problem}; "
                "give the shape of one sample, without the batch axis"
            ) from problem
        if not isinstance(output, Tensor) or output.shape[:1] != (PROBE_BATCH,):
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise GraphError(
                f"from_sequential: {layer} turned {given} into {found}, expected one tensor that keeps the batch axis, "
                f"here {PROBE_BATCH}, first"
            )
        if value._version != version and not isinstance(layer.module, in_place):
            raise GraphError(
                f"from_sequential: {layer} overwrites what it reads, which would be a latent; let it work on a copy"
            )
        shapes.append(tuple(output.shape[1:]))
        value = output
    return shapes


def _end_of_map(part: Sequence[nn.Module], nonlinear: Kinds) -> int:
    """How many modules belong to the edge: up to the last that is more than what transfers are made of."""
    maps = [place for place, m in enumerate(part) if not isinstance(m, (*nonlinear, *STAYING, *PREPARING))]
    return maps[-1] + 1 if maps else 0


def _joined(part: Sequence[nn.Module]) -> nn.Module | None:
    if not part:
        return None
    return part[0] if len(part) == 1 else nn.Sequential(*part)


class ForwardPass(nn.Module):
    """The forward pass of a network as a module of its own, made by :func:`to_module`.

    It holds the network's nodes and edges themselves, those that the outputs depend on, so that it computes with the
    network's present weights, and its ``state_dict`` has the network's names.
    """

    def __init__(self, inputs: Sequence[Node], outputs: Sequence[Node], order: Sequence[Node]) -> None:
        super().__init__()
        self.inputs = tuple(node.name for node in inputs)
        """Names of the nodes that the arguments of ``forward`` are values of, in their order."""
        self.outputs = tuple(node.name for node in outputs)
        """Names of the nodes whose values ``forward`` returns, in their order."""
        self._given_shapes = [node.shape for node in inputs]
        made = [node for node in order if node.name not in self.inputs]
        self._constants = {node.name: (node.shape, node.constant) for node in made if node.constant is not None}
        predicted = [node for node in made if node.constant is None]
        self._predicted = [(node.name, [(edge.name, edge.source_name) for edge in node.incoming]) for node in predicted]
        self.nodes, self.edges = nn.ModuleDict(), nn.ModuleDict()
        for node in predicted:
            self.nodes[node.name] = node
            self.edges.update({edge.name: edge for edge in node.incoming})

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Values of the outputs, (batch, *shape): one tensor, or a tuple where there are several.

        Args:
            values: of the inputs, (batch, *shape), in their order.

        Raises:
            ClampError: another number of values, or one of another shape.
        """
        if len(values) != len(self.inputs):
            raise ClampError(
                f"{len(values)} values given, expected one for each of the {len(self.inputs)} inputs, "
                f"{', '.join(self.inputs)}"
            )
        for name, shape, value in zip(self.inputs, self._given_shapes, values, strict=True):
            if value.dim() != len(shape) + 1 or tuple(value.shape[1:]) != shape:
                raise ClampError(
                    f"input {name!r}: shape {tuple(value.shape)} given, expected (batch, {', '.join(map(str, shape))})"
                )
        known = dict(zip(self.inputs, values, strict=True))
        dtype = tensor_options(self, otherwise=values[0])[0]
        for name, (shape, constant) in self._constants.items():
            known[name] = torch.full((values[0].shape[0], *shape), constant, dtype=dtype, device=values[0].device)
        for name, incoming in self._predicted:
            node = cast(Node, self.nodes[name])
            if incoming:
                known[name] = node.predict(
                    [cast(Edge, self.edges[edge]).contribute(known[source]) for edge, source in incoming]
                )
            else:
                known[name] = node.predict_from_prior(values[0].shape[0])
        results = tuple(known[name] for name in self.outputs)
        return results[0] if len(results) == 1 else results

    def extra_repr(self) -> str:
        """Inputs and outputs, for printing."""
        return f"{', '.join(self.inputs)} -> {', '.join(self.outputs)}"


def to_module(
    net: Network, *, inputs: Sequence[Node | str] | None = None, outputs: Sequence[Node | str] | None = None
) -> ForwardPass:
    """The forward pass of a network as an ``nn.Module``, for ``torch.export``, ONNX or any other use of one.

    Every node's value is its prediction, or its constant, so that in evaluation mode it gives what
    ``Simulator.predict`` gives where the inputs are clamped, and nothing else that has incoming edges is. It shares
    nodes, edges, modules and parameters with the network, their mode (training or evaluation) too.

    Example:
        >>> module = to_module(net).eval()
        >>> batch = torch.export.Dim("batch")
        >>> program = torch.export.export(module, (x,), dynamic_shapes=(({0: batch},),))

    Args:
        net: the network; cycles have to be cut by the inputs.
        inputs: nodes whose values are given, in the order of the arguments. What predicts them is left out. By default
            the roots without a prior or constant that the outputs depend on, in the order in which they were added.
        outputs: nodes whose values are wanted, in the order of the result: one tensor, or a tuple of several. By
            default all sinks that are neither inputs nor constant, in the order in which they were added.

    Raises:
        GraphError: a node is unknown or named twice; there is no input or no output, or an input that no output depends
            on; a cycle remains, or a root with neither a prior nor a value given.
    """
    net.check()
    given = None if inputs is None else _resolved(net, inputs, "inputs")
    if outputs is None:
        sinks = (node for node in net.sinks() if node.constant is None)
        wanted = [node for node in sinks if node.predicted and node not in (given or ())]
    else:
        wanted = _resolved(net, outputs, "outputs")
    if not wanted:
        raise GraphError("to_module: no output: every sink is an input; name the outputs")
    order = _needed(net, [] if given is None else given, wanted)
    if given is None:
        given = [n for n in net.roots() if n.prior is None and n.constant is None and n in order]
    unread = [node.name for node in given if node not in order]
    if unread:
        raise GraphError(f"to_module: no output depends on input {unread[0]!r}; leave it out, or name other outputs")
    if not given:
        raise GraphError(
            "to_module: no input, and so no batch: every root has a prior or is constant; name the nodes whose values "
            "are given"
        )
    for node in order:
        if not node.predicted and node not in given and node.constant is None:
            raise GraphError(
                f"to_module: nothing gives node {node.name!r} a value: it has no incoming edge and no prior; name it "
                "among the inputs"
            )
    return ForwardPass(given, wanted, order)


def _resolved(net: Network, nodes: Sequence[Node | str], argument: str) -> list[Node]:
    if isinstance(nodes, str | Node):
        raise GraphError(f"to_module: {argument}={nodes!r} given, expected a list of nodes")
    found = [net._resolve(node) for node in nodes]
    twice = [node.name for place, node in enumerate(found) if node in found[:place]]
    if twice:
        raise GraphError(f"to_module: {argument}: node {twice[0]!r} is named twice; name it once")
    return found


def _needed(net: Network, given: Sequence[Node], wanted: Sequence[Node]) -> list[Node]:
    """The nodes that the wanted ones depend on, each after all that predict it; edges into given ones, and into those
    that are constant, are cut.
    """
    cut = {node.name for node in given}.union(net.constants)
    kept = [(edge.source_name, edge.target_name) for edge in net.edges.values() if edge.target_name not in cut]
    graph = simple_graph(net, kept)
    names = {node.name for node in wanted}.union(*(nx.ancestors(graph, node.name) for node in wanted))
    place = {name: number for number, name in enumerate(net.nodes)}
    part = graph.subgraph(names)
    try:
        return [net[name] for name in nx.lexicographical_topological_sort(part, key=place.__getitem__)]
    except nx.NetworkXUnfeasible:
        cycle = [edge[0] for edge in nx.find_cycle(part)]
        raise GraphError(
            f"to_module: {' -> '.join((*cycle, cycle[0]))} is a cycle, which no forward pass computes; name a node of "
            "it among the inputs, or relax the network with a Simulator"
        ) from None
