"""Hypothesis strategies: random networks, and random problems on them.

Graphs are small (a few nodes of a few units) and cover what a user can build: chains, skips, cycles, self-loops,
parallel edges, deterministic nodes, one to three axes, shared modules, and a user's own nodes and edges. Everything
is drawn from hypothesis or from a drawn seed, so a failure shrinks and can be run again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from pcsim.dynamics.inference import ErrorRelaxation, Relaxation
from pcsim.dynamics.learning import Backprop, ForwardUpdate, IncrementalUpdate, LearningRule, SettledUpdate
from pcsim.dynamics.precision import Constant, Decaying, PrecisionSchedule, Spiking
from pcsim.errors import PCError
from pcsim.graph.clamping import Clamping
from pcsim.graph.combining import Concatenate, Product
from pcsim.graph.energy import CrossEntropy, LearnedPrecision
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.verify.case import Case, NamedClamps, SeededNetwork, fully_clamped
from pcsim.verify.parts import (
    SEEDS,
    EdgeFactory,
    NodeFactory,
    Shape,
    edge_modules,
    from_factory,
    node_options,
    shapes,
)
from pcsim.verify.shrinking import without

RULES: tuple[LearningRule, ...] = (SettledUpdate(), ForwardUpdate(), IncrementalUpdate(), Backprop())


ValueFactory = Callable[[Node, int], st.SearchStrategy[Tensor] | Tensor | None]
"""From a node and the batch to what it is given, (batch, *shape) in float64, or to a strategy for it; None for the
default."""


@st.composite
def networks(
    draw: st.DrawFn,
    *,
    nodes: tuple[int, int] = (2, 8),
    cycles: bool = True,
    deterministic: bool = True,
    combines: bool = True,
    priors: bool = True,
    cross_entropy: bool = True,
    sharing: bool = True,
    node_factory: NodeFactory = node_options,
    edge_factory: EdgeFactory = edge_modules,
    node_shapes: st.SearchStrategy[Shape] | None = None,
) -> SeededNetwork:
    """Random networks in float64, weights from a drawn seed.

    With factories, the graphs are random and the parts a user's own:

        verify.networks(
            node_factory=lambda shape: {"transfer": nn.Softplus(), "energy": MyEnergy()},
            edge_factory=lambda source, contribution: MyModule(source[0], contribution[0]),
            node_shapes=st.tuples(st.integers(1, 4)),
        )

    A factory is called anew for every node or edge, and makes a new module each time, or returns a strategy that
    does; it returns None for the default part, where its own does not fit. All parameters are drawn anew, uniformly
    within ±1/√fan_in.

    Args:
        draw: given by hypothesis.
        nodes: fewest and most nodes.
        cycles: allow edges back and to the node itself.
        deterministic: allow deterministic nodes.
        combines: allow products and concatenations beside sums.
        priors: allow priors on roots.
        cross_entropy: allow that energy on sinks.
        sharing: allow one module on several edges.
        node_factory: arguments of nodes by shape: transfer, energy_weight, precision, energy.
        edge_factory: modules by the shapes of their source and of their contribution.
        node_shapes: shapes of nodes; :func:`shapes` by default.
    """
    count = draw(st.integers(*nodes))
    ends = draw(_edge_ends(count, cycles))
    palette = draw(st.lists(shapes() if node_shapes is None else node_shapes, min_size=1, max_size=3))
    network = SeededNetwork()
    contributions: list[list[Shape]] = []
    for index in range(count):
        before = [source for source, target in ends if target == index]
        leaves = any(source == index for source, _ in ends)
        shape = draw(st.sampled_from(palette))
        options = dict(from_factory(draw, node_factory(shape), functools.partial(node_options, shape)))
        backward = any(source >= index for source in before)
        combine, given = draw(_combine(shape, len(before), combines))
        contributions.append(given)
        if before and not backward and deterministic and leaves and draw(st.integers(0, 3)) == 3:
            options["deterministic"] = True
        if not before and priors and not any(key in options for key in ("prior", "deterministic")):
            options["prior"] = draw(_priors(shape))
        if not leaves and before and cross_entropy and "energy" not in options and draw(st.integers(0, 3)) == 3:
            options |= {"energy": CrossEntropy(), "transfer": None}
            if isinstance(options.get("precision"), LearnedPrecision):
                del options["precision"]
        network.add_node(f"n{index}", shape, combine=combine, **options)
    made: dict[tuple[Shape, Shape], nn.Module] = {}
    for target in range(count):
        before = [source for source, end in ends if end == target]
        for source, shape in zip(before, contributions[target], strict=True):
            key = network[f"n{source}"].shape, shape
            if sharing and key in made and draw(st.integers(0, 5)) == 5:
                module = made[key]
            else:
                module = made[key] = from_factory(draw, edge_factory(*key), functools.partial(edge_modules, *key))
            gain = draw(st.sampled_from((1.0, 1.0, 1.0, 0.5, -0.75)))
            network.add_edge(f"n{source}", f"n{target}", module, gain=gain)
    network.double()
    network.seed_weights(draw(SEEDS))
    return network


@st.composite
def own_networks(draw: st.DrawFn, make: Callable[[], Network]) -> SeededNetwork:
    """A user's own network, in float64, its parameters drawn anew from a drawn seed.

    Args:
        draw: given by hypothesis.
        make: builds the network; called for every example.
    """
    network = without(make()).double()
    network.seed_weights(draw(SEEDS))
    return network


@functools.cache
@st.composite
def _edge_ends(draw: st.DrawFn, count: int, cycles: bool) -> list[tuple[int, int]]:
    """Indices of sources and targets: mostly forward and connected, parallel edges allowed."""
    ends = []
    for target in range(1, count):
        if draw(st.integers(0, 5)) == 5:
            continue  # another root
        sources = [target - 1] if draw(st.booleans()) else []
        sources += draw(st.lists(st.integers(0, target - 1), min_size=1 - len(sources), max_size=2))
        ends += [(source, target) for source in sources]
    if cycles and draw(st.booleans()):
        for _ in range(draw(st.integers(1, 2))):
            target = draw(st.integers(0, count - 1))
            ends.append((draw(st.integers(target, count - 1)), target))
    return ends


@functools.cache
@st.composite
def _combine(draw: st.DrawFn, shape: Shape, count: int, any_kind: bool) -> tuple[nn.Module | None, list[Shape]]:
    """How a node combines its inputs, and the shape of each."""
    kinds = ["sum", "sum"]
    if any_kind and count > 1:
        kinds.append("product")
        if count <= shape[0]:
            kinds.append("concatenate")
    kind = draw(st.sampled_from(kinds))
    if kind == "concatenate":
        sizes = [shape[0] // count + (place < shape[0] % count) for place in range(count)]
        return Concatenate(), [(size, *shape[1:]) for size in sizes]
    return Product() if kind == "product" else None, [shape] * count


@functools.cache
@st.composite
def _priors(draw: st.DrawFn, shape: Shape) -> float | Tensor | None:
    kind = draw(st.sampled_from(("none", "none", "number", "per unit", "learned")))
    if kind == "none":
        return None
    if kind == "number":
        return draw(st.sampled_from((0.0, 0.5, -1.0)))
    prior = torch.zeros(shape, dtype=torch.float64)
    if kind == "learned":
        return nn.Parameter(prior)
    return torch.rand(shape, generator=torch.Generator().manual_seed(draw(SEEDS)), dtype=torch.float64)


@st.composite
def clamps(
    draw: st.DrawFn,
    network: Network,
    *,
    batch: int,
    partial: bool = True,
    targets: bool | None = None,
    every_root: bool = False,
    values: ValueFactory | None = None,
) -> NamedClamps:
    """What is given of a network: some of its roots, and none, one or several targets, in whole or in part.

    Nodes with a cross-entropy energy are given distributions, and mostly given: without a clamp their energy has no
    minimum.

    Args:
        draw: given by hypothesis.
        network: the graph.
        batch: number of samples.
        partial: allow masks.
        targets: whether at least one node with incoming edges is given; None leaves it open.
        every_root: give every node without incoming edges and without a prior.
        values: what a node is given, (batch, *shape) in float64, from the node and the batch, or a strategy for it;
            None, altogether or for a node: standard normal numbers.
    """
    given: NamedClamps = {}
    roots = [node for node in network.nodes.values() if not node.incoming]
    others = [node for node in network.nodes.values() if node.incoming]
    chosen = [n for n in roots if (every_root and n.prior is None) or draw(st.integers(0, 4)) < 4]
    entropic = [n for n in others if isinstance(n.energy_function, CrossEntropy) and draw(st.integers(0, 7)) < 7]
    if targets is not False and others:
        fewest = 1 if targets and not entropic else 0
        picked = draw(st.lists(st.sampled_from(others), min_size=fewest, max_size=2, unique_by=lambda n: n.name))
        chosen += [n for n in picked if n not in entropic]
    chosen += entropic
    if not chosen:
        chosen = roots[:1] or others[:1]
    for node in chosen:
        masks = partial and not node.deterministic and not isinstance(node.energy_function, CrossEntropy)
        own = None if values is None else values(node, batch)
        value = from_factory(draw, own, functools.partial(_values, node, batch))
        given[node.name] = draw(_clamp(node, value, masks and not (every_root and not node.incoming)))
    return given


def _values(node: Node, batch: int) -> st.SearchStrategy[Tensor]:
    def value(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(batch, *node.shape, generator=generator, dtype=torch.float64)
        return torch.softmax(normal, 1) if isinstance(node.energy_function, CrossEntropy) else normal

    return SEEDS.map(value)


@st.composite
def _clamp(draw: st.DrawFn, node: Node, value: Tensor, masks: bool) -> Tensor | tuple[Tensor, Tensor]:
    kind = draw(st.sampled_from(("full", "full", "full", "units", "samples"))) if masks else "full"
    if kind == "full":
        return value
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return value, torch.rand(value.shape if kind == "samples" else node.shape, generator=generator) < 0.5


@functools.cache
@st.composite
def schedules(draw: st.DrawFn, rate: float, *, silent: bool = False) -> PrecisionSchedule:
    """Constant, spiking (α = 0 and the paper's Eq. 4 among them) and decaying schedules.

    Args:
        draw: given by hypothesis.
        rate: of the relaxation.
        silent: only those that are 0 until the error has arrived.
    """
    if silent:
        spiking = Spiking.for_rate(rate), Spiking(alpha=0.0), Spiking(alpha=0.0, peak=2.0)
        return draw(st.sampled_from((*spiking, *spiking, Decaying())))
    kind = draw(st.sampled_from(("constant", "spiking", "covariance", "decaying")))
    if kind == "constant":
        return Constant(draw(st.sampled_from((1.0, 0.5, 0.0))))
    if kind == "spiking":
        return Spiking(alpha=draw(st.sampled_from((0.0, 0.0, 1e-3, 0.5))), peak=draw(st.sampled_from((1.0, 2.0))))
    if kind == "covariance":
        return Spiking.as_covariance(rate)
    return Decaying(k=draw(st.sampled_from((1.0, 0.5))), tail=draw(st.sampled_from(("multiplied", "divided"))))


@st.composite
def relaxations(
    draw: st.DrawFn,
    deepest: int,
    *,
    momentum: bool = True,
    most_steps: int = 5,
    silent: bool = False,
    held: bool = False,
    sampled: bool = False,
    multiplied: bool = False,
    by_errors: bool = False,
    judged: bool = False,
    stops: bool = False,
) -> Relaxation:
    """Relaxations that last until every error has arrived, where the schedule asks for it.

    Args:
        draw: given by hypothesis.
        deepest: the largest level of a node with an energy.
        momentum: allow it.
        most_steps: unless the schedule needs more.
        silent: with a schedule that is 0 until the error has arrived.
        held: allow predictions that are held.
        sampled: allow a temperature.
        multiplied: allow multipliers.
        by_errors: allow errors that move in place of values.
        judged: allow a least rate.
        stops: allow a tolerance.
    """
    rate = draw(st.sampled_from((0.1, 0.25, 0.5, 0.8)))
    errors = by_errors and draw(st.booleans())
    adapts = judged and draw(st.booleans())
    constant = st.sampled_from((1.0, 0.5, 0.0)).map(Constant)
    schedule = draw(constant if errors or adapts else schedules(rate, silent=silent))
    fewest = 0 if isinstance(schedule, Constant) else deepest + 1
    steps = draw(st.integers(fewest, max(fewest, most_steps)))
    friction = draw(st.sampled_from((0.0, 0.0, 0.5, 0.9))) if momentum and not adapts else 0.0
    nesterov = bool(friction) and draw(st.booleans())
    if adapts:
        return (ErrorRelaxation if errors else Relaxation)(steps, 4 * rate, precision=schedule, least_rate=rate / 4)
    warm = 0.1 if sampled and not friction and draw(st.integers(0, 5)) == 0 else 0.0
    small = draw(st.sampled_from((0.03, 0.3))) if stops and not warm and draw(st.integers(0, 4)) == 0 else None
    if errors:
        return ErrorRelaxation(
            steps,
            rate,
            precision=schedule,
            momentum=friction,
            nesterov=nesterov,
            temperature=warm,
            tolerance=small,
        )
    hold = held and draw(st.integers(0, 3)) == 0
    grown = 0.3 if multiplied and not (hold or small) and draw(st.integers(0, 4)) == 0 else 0.0
    return Relaxation(
        steps,
        rate,
        precision=schedule,
        momentum=friction,
        nesterov=nesterov,
        hold_predictions=hold,
        temperature=warm,
        multipliers=grown,
        tolerance=small,
    )


@st.composite
def cases(
    draw: st.DrawFn,
    graphs: st.SearchStrategy[Network] | None = None,
    *,
    rules: Sequence[LearningRule] = RULES,
    momentum: bool = True,
    held: bool = False,
    sampled: bool = False,
    multiplied: bool = False,
    by_errors: bool = False,
    judged: bool = False,
    stops: bool = False,
    partial: bool = True,
    targets: bool | None = None,
    every_root: bool = False,
    most_samples: int = 3,
    most_steps: int = 5,
    values: ValueFactory | None = None,
) -> Case:
    """Random problems: a network, clamps, a relaxation, a rule, a batch, and whether energies are recorded.

    Args:
        draw: given by hypothesis.
        graphs: strategy for the networks; :func:`networks` by default, :func:`own_networks` for one of a user's own.
        rules: to draw from; backprop only where the graph and the clamps allow it.
        momentum: allow it.
        held: allow predictions that are held.
        sampled: allow a temperature.
        multiplied: allow multipliers, where the rule knows them.
        by_errors: allow errors that move in place of values, where the rule and the graph do.
        judged: allow a least rate, where the rule does.
        stops: allow a tolerance.
        partial: allow masks.
        targets: whether at least one node with incoming edges is given; None leaves it open.
        every_root: give every node without incoming edges and without a prior, in whole.
        most_samples: largest batch.
        most_steps: T at most, unless the schedule needs more.
        values: as of :func:`clamps`.
    """
    network = draw(networks() if graphs is None else graphs)
    batch = draw(st.integers(1, most_samples))
    given = draw(clamps(network, batch=batch, partial=partial, targets=targets, every_root=every_root, values=values))
    full = fully_clamped(given)
    possible = [rule for rule in rules if not rule.backprop or _backprop_possible(network, given)]
    clamping = Clamping(network, full, frozenset(given) - full)
    levels = clamping.levels
    deepest = max((levels[name] for name in clamping.energetic if name in levels), default=0)
    rule = draw(st.sampled_from(possible or [SettledUpdate()]))
    hold, silent = held and not rule.every_step, rule.at_arrival
    carries = multiplied and type(rule) is SettledUpdate
    kinds = relaxations(
        deepest,
        momentum=momentum,
        most_steps=most_steps,
        silent=silent,
        held=hold,
        sampled=sampled,
        multiplied=carries,
        by_errors=by_errors and type(rule) is SettledUpdate and not clamping.cyclic,
        judged=judged and not (rule.every_step or rule.at_arrival),
        stops=stops,
    )
    relaxation = draw(kinds)
    return Case(network, given, relaxation, rule, draw(st.sampled_from((False, False, True, None))))


def _backprop_possible(network: Network, given: NamedClamps) -> bool:
    full = fully_clamped(given)
    try:
        _ = Clamping(network, full, frozenset(given) - full, backprop=True).order
    except PCError:
        return False
    return True
