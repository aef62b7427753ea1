"""What is refused as it is added to a network, or put in the place of something there."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pcsim.errors import ClampError, GraphError
from pcsim.graph.combining import Sum
from pcsim.graph.energy import Energy
from pcsim.graph.fingerprint import identity_of
from pcsim.graph.probing import (
    PROBE_BATCH,
    checkpoints_reentrantly,
    integers_taken,
    may_draw,
    parameters_of,
    plain,
    probe,
    start_lazily,
    tensor_options,
    what_stays,
    zeros_for,
)
from pcsim.graph.statistics import frozen_statistics, normalises
from pcsim.messages import instead_of, sizes

if TYPE_CHECKING:
    from pcsim.graph.edge import Edge
    from pcsim.graph.network import Network
    from pcsim.graph.node import Node
    from pcsim.graph.part import Part


def shape(node: str, given: object) -> tuple[int, ...]:
    """The shape of a node as positive numbers."""
    try:
        axes = tuple(given) if isinstance(given, Sequence | np.ndarray | torch.Size) else (given,)
        found = tuple(operator.index(size) for size in axes if not isinstance(size, bool))
    except TypeError:
        found = ()
        axes = (None,)
    if len(found) != len(axes) or any(size <= 0 for size in found):
        raise GraphError(f"node {node!r}: shape {given!r} given, expected positive numbers, batch axis left out")
    return found


def module(argument: str, given: object) -> None:
    """Refuse what is no module."""
    if given is None or isinstance(given, nn.Module):
        return
    mend = instead_of(given, nn.Module, "wrap a function in a module")
    raise GraphError(f"{argument} {given!r} given, expected an instance of nn.Module; {mend}")


def energy(node: Node, given: object, *, per_unit: bool) -> None:
    """Refuse what is no energy, or gives anything but one number per unit.

    Args:
        node: whose energy it is to be.
        given: the energy.
        per_unit: the node's precision is one number for each unit.
    """
    if not isinstance(given, Energy):
        mend = instead_of(given, Energy, "write Gaussian(), CrossEntropy(), another of pcsim's, or one of your own")
        raise GraphError(f"node {node.name!r}: energy {given!r} given, expected an instance of Energy; {mend}")
    if given.gaussian:
        return
    value = torch.full((PROBE_BATCH, *node.shape), 0.5)
    try:
        with torch.no_grad():
            found = given.unit_energy(value, value.clone())
    except Exception as problem:
        raise GraphError(
            f"node {node.name!r}: its energy, {given!r}, does not accept values of (batch, "
            f"{sizes(node.shape)}): {problem}"
        ) from problem
    whole_sample = isinstance(found, Tensor) and found.shape == (PROBE_BATCH, *[1] * len(node.shape))
    if whole_sample and found.shape != value.shape and per_unit:
        raise GraphError(
            f"node {node.name!r}: its energy, {given!r}, gives one number for all units, which a precision of one "
            "number per unit cannot weigh; give one number as precision, or an energy that splits over units"
        )
    if not isinstance(found, Tensor) or not (whole_sample or found.shape == value.shape):
        given_shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise GraphError(
            f"node {node.name!r}: unit_energy of its energy, {given!r}, turned {tuple(value.shape)} into "
            f"{given_shape}, expected one number for each unit; leave the summing to the library"
        )


def prior(node: Node, given: object) -> Tensor | None:
    """A prior as a tensor; a parameter stays one."""
    if given is None:
        return None
    if node.name in node.network and node.integers is not None:
        raise GraphError(
            f"node {node.name!r}: holds integers, since its edges read such, and nothing predicts integers; drop the "
            "prior"
        )
    if node.deterministic:
        raise GraphError(f"node {node.name!r}: a deterministic node has no energy for a prior to enter; drop one")
    if node.network.in_degree(node.name) if node.name in node.network else False:
        raise GraphError(
            f"node {node.name!r}: a prior stands where no edge predicts a node; drop the prior or the edges"
        )
    try:
        tensor = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
        if not isinstance(given, Tensor) or not tensor.is_floating_point():
            tensor = tensor.to(torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError) as problem:
        raise GraphError(
            f"node {node.name!r}: prior {given!r} given, expected a number or one per unit, {node.shape}: {problem}"
        ) from problem
    if not bool(torch.isfinite(tensor).all()):
        raise GraphError(f"node {node.name!r}: the prior is NaN or infinite; give finite numbers")
    if tensor.shape not in (torch.Size(()), torch.Size(node.shape)):
        raise GraphError(
            f"node {node.name!r}: prior of shape {tuple(tensor.shape)} given, expected one number or one per unit, "
            f"{node.shape}"
        )
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone().to(node.device)


def integers(edge: str, source: Node, target: Node, given: nn.Module) -> None:
    """Refuse an edge by which integers would be predicted, or a value be both integers and numbers.

    Args:
        edge: name of the edge, which may be in the network already.
        source: node that it reads.
        target: node that it helps to predict.
        given: its module.
    """
    takes = integers_taken(given)
    # All edges out of a node read the same, so that one of them tells.
    other = next((other for other in source.outgoing if other.name != edge), None)
    onwards = next(iter(target.outgoing), None) if target is not source else None
    if (onwards is not None and integers_taken(onwards.module) is not None) or (takes is not None and source is target):
        raise GraphError(
            f"edge {edge!r}: node {target.name!r} holds integers, since its edges read such, and nothing predicts "
            "integers; let it be a root, which is clamped"
        )
    if takes is not None and (source.predicted or source.deterministic):
        raise GraphError(
            f"edge {edge!r}: its module, {given!r}, takes integers, which only a root that is clamped can hold, and "
            f"node {source.name!r} is {'deterministic' if source.deterministic else 'predicted'}; give a module that "
            "takes numbers"
        )
    if other is not None and (integers_taken(other.module) is None) != (takes is None):
        kinds = ("numbers", "integers") if takes is None else ("integers", "numbers")
        raise GraphError(
            f"edge {edge!r}: its module, {given!r}, takes {kinds[0]}, but edge {other.name!r} reads {kinds[1]} of node "
            f"{source.name!r}; give a node of its own to each (a module of your own that takes integers says how many "
            "by num_embeddings)"
        )


def contribution(edge: str, source: Node, target: Node, given: nn.Module) -> Tensor:
    """What an edge's module makes of zeros, (2, ...); refuses what does not fit, works in place, or keeps a state."""
    integers(edge, source, target, given)
    dtype, device = tensor_options(given, target)
    value = zeros_for(given, source.shape, dtype, device)
    before = value._version
    try:
        start_lazily(given, [value])
        found = probe(given, [value])
    except Exception as problem:
        raise GraphError(
            f"edge {edge!r}: its module, {given!r}, does not accept a value of node {source.name!r}, shape "
            f"(batch, {sizes(source.shape)}): {problem}"
        ) from problem
    if not isinstance(found, Tensor) or found.shape[:1] != (PROBE_BATCH,):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise GraphError(
            f"edge {edge!r}: its module turned (batch, {sizes(source.shape)}) into {got}, expected one tensor that "
            f"keeps the batch axis, here {PROBE_BATCH}, first"
        )
    if value._version != before:
        raise GraphError(
            f"edge {edge!r}: its module, {given!r}, works in place, so it would overwrite the value of node "
            f"{source.name!r}; give it inplace=False"
        )
    return found


def prediction(node: Node, contributions: list[Tensor], edge: str, combine: nn.Module, transfer: nn.Module) -> None:
    """Refuse what does not turn the contributions into a prediction of the node's shape, or works in place."""
    before = [each._version for each in contributions]
    try:
        start_lazily(combine, contributions)
        combined = probe(combine, contributions)
        before.append(combined._version)
        start_lazily(transfer, [combined])
        found = probe(transfer, [combined])
    except Exception as problem:
        given = ", ".join(f"(batch, {sizes(c.shape[1:])})" for c in contributions)
        raise GraphError(
            f"edge {edge!r}: node {node.name!r} cannot turn {given} into a prediction of its shape {node.shape} "
            f"with combine {combine!r} and transfer {transfer!r}: {problem}"
        ) from problem
    if [tensor._version for tensor in (*contributions, combined)] != before:
        raise GraphError(
            f"edge {edge!r}: node {node.name!r} works in place, in combine {combine!r} or transfer {transfer!r}, so it "
            "would overwrite what its edges contribute; give inplace=False"
        )
    if tuple(found.shape) != (PROBE_BATCH, *node.shape):
        raise GraphError(
            f"edge {edge!r} predicts (batch, {sizes(found.shape[1:])}) for node {node.name!r}, whose shape is (batch, "
            f"{sizes(node.shape)}); change the module, the node's transfer, or the node's shape"
        )
    for role, given_module, inputs in (("combine", combine, contributions), ("transfer", transfer, [combined])):
        kept_state(f"node {node.name!r}: its {role}", given_module, inputs)


def kept_state(place: str, given: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether a module's buffers move as it is evaluated; refuses a state kept elsewhere."""
    moves, attribute = what_stays(given, inputs)
    if attribute:
        raise GraphError(
            f"{place}, {given!r}, keeps a state in its attribute {attribute!r}, and is evaluated many times on a "
            "batch; register it as a buffer, which then moves once per batch, or make it a node of the graph"
        )
    return moves


def look_at_edge(edge: Edge, given: nn.Module, found: Tensor) -> None:
    """Find out what evaluating an edge's module does besides computing; ``found`` is what it makes of zeros."""
    dtype, device = found.dtype if found.is_floating_point() else torch.get_default_dtype(), found.device
    value = zeros_for(given, edge.source.shape, dtype, device)
    moves = kept_state(f"edge {edge.name!r}: its module", given, [value])
    edge.stochastic, edge.moves = may_draw(given), moves
    edge.reentrant = checkpoints_reentrantly(given, [value])
    edge._contribution_shape = tuple(found.shape[1:])
    edge.looked_at = identity_of([given])


def look_at_node(node: Node, combine: nn.Module, transfer: nn.Module, contributions: list[Tensor]) -> None:
    """Find out what evaluating a node's modules does besides computing."""
    moves = reentrant = False
    if contributions and not (plain(combine) and plain(transfer)):
        combined = probe(combine, contributions)
        moves = what_stays(combine, contributions)[0] or what_stays(transfer, [combined])[0]
        reentrant = checkpoints_reentrantly(combine, contributions) or checkpoints_reentrantly(transfer, [combined])
    node.reentrant = reentrant
    node.stochastic, node.moves = may_draw(combine) or may_draw(transfer), moves
    node.looked_at = identity_of([combine, transfer])


def replaced_edge(edge: Edge, given: nn.Module) -> None:
    """Check a module that is to take the place of an edge's own; the edge's shape and flags follow."""
    found = contribution(edge.name, edge.source, edge.target, given)
    target = edge.target
    if type(target.combine) is Sum:
        fits_the_others(edge.name, target, found, [e for e in target.incoming if e is not edge])
        prediction(target, [found], edge.name, target.combine, target.transfer)
    look_at_edge(edge, given, found)


def replaced_in_node(node: Node, role: str, given: nn.Module) -> None:
    """Check a module that is to take the place of a node's combine or transfer; the node's flags follow."""
    combine = given if role == "combine" else node.combine
    transfer = given if role == "transfer" else node.transfer
    contributions = [contribution(e.name, e.source, node, e.module) for e in node.incoming]
    if contributions:
        prediction(node, contributions, node.incoming[-1].name, combine, transfer)
    look_at_node(node, combine, transfer, contributions)


def fits_the_others(edge: str, target: Node, found: Tensor, others: Sequence[Edge]) -> None:
    """Refuse a contribution of another shape than those that it is added to."""
    first = next(iter(others), None)
    if first is not None and first.contribution_shape != found.shape[1:]:
        raise GraphError(
            f"edge {edge!r} contributes (batch, {sizes(found.shape[1:])}), but edge {first.name!r} contributes (batch, "
            f"{sizes(first.contribution_shape)}) to the same node; a sum takes equal shapes"
        )


def single_sample(network: Network) -> None:
    """Refuse one sample where a module takes the mean and spread of the batch.

    Raises:
        ClampError: names the edge or node.
    """
    for edge in network.edges.values():
        _takes_one(f"edge {edge.name!r}", edge.module, edge.source.shape)
    for node in network.nodes.values():
        shape = next((edge.contribution_shape for edge in node.incoming), None)
        if shape is not None and type(node.combine) is Sum:
            _takes_one(f"node {node.name!r}", node.transfer, shape)


def _takes_one(place: str, given: nn.Module, shape: tuple[int, ...]) -> None:
    by_batch = any(isinstance(part, _BatchNorm) and part.training for part in given.modules())
    if plain(given) and not by_batch:
        return
    dtype, device = tensor_options(given)
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(PROBE_BATCH, *shape, generator=generator).to(device, dtype)
    if integers_taken(given) is not None:
        value = zeros_for(given, shape, dtype, device)
    fits = [_whole(given, sample) for sample in (value[:1], value)]
    if not fits[0] and fits[1]:
        raise ClampError(
            f"a batch of one sample given, but {place} normalises over the batch, which takes two; leave out a last "
            "batch of one (DataLoader(drop_last=True)), or call network.eval()"
        )


def _whole(given: nn.Module, value: Tensor) -> bool:
    """Whether a module makes finite numbers of a value."""
    try:
        with frozen_statistics([part for part in given.modules() if normalises(part)]):
            return bool(torch.isfinite(probe(given, [value])).all())
    except Exception:  # what it does not take is told by what is compared with it
        return False


def one_place(network: Network) -> None:
    """Refuse, where nodes are placed, those that are not, and modules that lie elsewhere than they are placed."""
    if all(node.device is None for node in network.nodes.values()):
        return
    for node in network.nodes.values():
        for part in (node, *node.incoming):
            if part.device is None:
                raise GraphError(
                    f"{part.kind} {part.name!r} was added after others were placed; call network.place again"
                )
            stray = next((t for t in (*part.parameters(), *part.buffers()) if t.device != node.device), None)
            if stray is not None:
                raise GraphError(
                    f"{part.kind} {part.name!r} lies on {node.device}, but something of it on {stray.device}: put the "
                    "nodes that share a module in one place, or give each its own; of a module that was exchanged, "
                    "call network.place again"
                )


def one_dtype(network: Network) -> None:
    """Refuse modules, and priors that learn, that differ in dtype or, where nodes are not placed, in device; the other
    numbers that nodes have of their own follow.
    """
    found: tuple[Part, Tensor] | None = None
    placed = any(node.device is not None for node in network.nodes.values())
    modules: list[tuple[Part, nn.Module]] = [(edge, edge.module) for edge in network.edges.values()]
    modules += [(node, module) for node in network.nodes.values() for module in (node.transfer, node.combine)]
    held = ((part, parameter) for part, module in modules for parameter in parameters_of(module))
    learned = ((node, node.prior) for node in network.nodes.values() if isinstance(node.prior, nn.Parameter))
    for part, parameter in chain(held, learned):
        if not parameter.is_floating_point():
            continue
        first, like = found = found or (part, parameter)
        if parameter.dtype != like.dtype or (parameter.device != like.device and not placed):
            raise GraphError(
                f"{part.kind} {part.name!r} has parameters of {parameter.dtype} on {parameter.device}, but "
                f"{first.kind} {first.name!r} has {like.dtype} on {like.device}; convert the whole network with "
                "network.to(...)"
            )
    if found is not None:
        for node in network.nodes.values():
            node.convert_own(found[1].dtype, None if placed else found[1].device)


def whole(network: Network) -> None:
    """Check what can only be checked once the graph is whole, and look again at parts whose modules were exchanged.

    Raises:
        GraphError: a node's arguments do not fit, a part does not, or modules differ in dtype, or lie elsewhere than
            they should.
    """
    one_dtype(network)
    one_place(network)
    for edge in network.edges.values():
        if edge.looked_at != identity_of([edge.module]):
            replaced_edge(edge, edge.module)
    for node in network.nodes.values():
        exchanged = node.looked_at != identity_of([node.combine, node.transfer])
        if exchanged or (node.incoming and type(node.combine) is not Sum):
            replaced_in_node(node, "transfer", node.transfer)
    for part in (*network.edges.values(), *network.nodes.values()):
        differentiable(part)


def differentiable(part: Part) -> None:
    """Refuse modules through which no gradient can be asked for.

    Raises:
        GraphError: names the edge or node.
    """
    if part.reentrant:
        raise GraphError(
            f"{part.kind} {part.name!r}: its module checkpoints reentrantly, through which local gradients cannot be "
            "asked for; give checkpoint(..., use_reentrant=False)"
        )
