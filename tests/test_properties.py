"""Truths about any network (SPEC §10), on random ones; oracles: autograd on the whole energy, and the graph itself."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import attrs
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, optim

import pcsim
from pcsim import verify
from pcsim.errors import DivergenceError, PCError
from pcsim.verify import Case
from pcsim.verify.restart import Horizon

ENGINES = ("reference", "batched")
LOCAL_RULES = tuple(rule for rule in verify.RULES if not rule.backprop)

thorough = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)

NETWORKS = verify.networks(nodes=(2, 6))
SMALL = verify.networks(nodes=(2, 5))
ACYCLIC = verify.networks(nodes=(2, 6), cycles=False)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    """Whether two tensors agree, relative to the larger one."""
    size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return got.shape == expected.shape and bool(((got - expected).abs() <= tolerance * size).all())


def values(network: pcsim.Network) -> dict[str, Tensor]:
    """A copy of every node's value."""
    return {name: node.value.clone() for name, node in network.nodes.items()}


def gradients(network: pcsim.Network) -> dict[str, Tensor | None]:
    """A copy of every parameter's gradient."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}


def teaches(case: Case) -> bool:
    """Whether a clamped node is predicted, so that there is an error to learn from."""
    return any(case.network[name].predicted for name in case.clamps)


# Local rules against autograd


@thorough
@given(case=verify.cases(SMALL, momentum=False, most_steps=2, most_samples=2))
def test_local_rules_equal_autograd_of_the_total_energy(case: Case) -> None:
    for engine in ENGINES:
        verify.check_gradients(case.network, case.clamps, case.relaxation, engine=engine)


@thorough
@given(case=verify.cases(ACYCLIC, rules=[pcsim.Backprop()], partial=False, targets=True, every_root=True, most_steps=1))
def test_backprop_equals_autograd_of_the_composed_function(case: Case) -> None:
    assume(case.rule.backprop and teaches(case))
    at_once = attrs.evolve(case.relaxation, steps=0)
    for engine in ENGINES:
        verify.check_gradients(case.network, case.clamps, at_once, case.rule, engine=engine, tolerance=1e-12)


@thorough
@given(case=verify.cases(NETWORKS, rules=LOCAL_RULES[:2], most_steps=3))
def test_what_nodes_and_edges_show_makes_the_next_step(case: Case) -> None:
    for engine in ENGINES:
        case.simulator(engine).infer(case.clamps)
        state = values(case.network)
        leaves = {name: state[name].clone().requires_grad_() for name in case.free}
        factors = case.factors(max(case.relaxation.steps - 1, 0))
        energy = verify.total_energy(case.network, {**state, **leaves}, case.deterministic, factors)
        for name, leaf in leaves.items():
            node = case.network[name]
            descent = sum((edge.message for edge in node.outgoing), torch.zeros_like(state[name]))
            if node.predicted:
                scale = node.energy_weight * node.precision
                descent = descent - node.energy_function.value_gradient(node.value, node.prediction, scale)
            slope = None
            if energy.requires_grad:
                slope = torch.autograd.grad(energy, leaf, retain_graph=True, allow_unused=True)[0]
            assert close(descent, torch.zeros_like(state[name]) if slope is None else -slope), name


# Space and time


@thorough
@given(case=verify.cases(SMALL, momentum=False, most_steps=2))
def test_updates_are_local_in_space_and_time(case: Case) -> None:
    verify.check_locality(case.network, case.clamps, case.relaxation)


@thorough
@given(case=verify.cases(SMALL, rules=[pcsim.SettledUpdate()], momentum=False, most_steps=3, most_samples=2))
def test_held_predictions_are_local_in_space_and_time(case: Case) -> None:
    verify.check_locality(case.network, case.clamps, attrs.evolve(case.relaxation, hold_predictions=True))


@thorough
@given(case=verify.cases(SMALL, rules=LOCAL_RULES[:2], momentum=False, most_steps=2, most_samples=1))
def test_a_small_step_does_not_raise_the_energy(case: Case) -> None:
    verify.check_descent(case.network, case.clamps, case.relaxation, case.rule)


@thorough
@given(case=verify.cases(SMALL, rules=LOCAL_RULES[:2], most_steps=2))
def test_recorded_energies_are_those_of_each_state(case: Case) -> None:
    trace = case.simulator().infer(case.clamps, record=True)
    steps = case.relaxation.steps
    assert trace.energies is not None
    assert trace.free_energies is not None
    assert trace.energies.shape == (steps + 1, len(trace.nodes), case.batch)
    for taken in range(steps + 1):
        horizon = Horizon(case.relaxation.precision, steps)
        part = attrs.evolve(case.relaxation, steps=taken, precision=horizon)
        pcsim.Simulator(case.network, part, case.rule).infer(case.clamps)
        state, factors = values(case.network), case.factors(min(taken, max(steps - 1, 0)))
        with torch.no_grad():
            total = verify.total_energy(case.network, state, case.deterministic, factors)
        assert close(trace.free_energies[taken], total)
        for row, name in enumerate(trace.nodes):
            assert close(trace.energies[taken, row], case.network[name].energy), name


# What must not matter


def reordered(network: pcsim.Network, order: random.Random) -> pcsim.Network:
    """The same network built in another order; edges into a concatenation keep theirs."""
    old, new = copy.deepcopy(network), pcsim.Network()
    for node in order.sample(list(old.nodes.values()), len(old.nodes)):
        learned = node.log_precision is not None
        precision = pcsim.LearnedPrecision(per_unit=node.log_precision.dim() > 0) if learned else node.own_precision
        made = new.add_node(
            node.name,
            node.shape,
            transfer=node.transfer,
            combine=node.combine,
            energy=node.energy_function,
            energy_weight=node.energy_weight,
            precision=precision,
            deterministic=node.deterministic,
            prior=node.prior,
        )
        if learned:
            made.log_precision = node.log_precision
    edges = order.sample(list(old.edges.values()), len(old.edges))
    waiting = {name: iter(node.incoming) for name, node in old.nodes.items()}
    for edge in edges:
        ordered = isinstance(edge.target.combine, pcsim.Concatenate)
        edge = next(waiting[edge.target_name]) if ordered else edge
        new.add_edge(edge.source_name, edge.target_name, edge.module, gain=edge.gain, name=edge.name)
    return new


@thorough
@given(case=verify.cases(SMALL, most_steps=3), seed=st.integers(0, 1000))
def test_order_of_insertion_does_not_matter(case: Case, seed: int) -> None:
    results = []
    for network in (copy.deepcopy(case.network), reordered(case.network, random.Random(seed))):
        simulator = pcsim.Simulator(network, case.relaxation, case.rule)
        if teaches(case):
            recorder = verify.RecordingOptimizer(network, 0.01)
            simulator.update(case.clamps, recorder)
            results.append((values(network), recorder.gradients))
        else:
            simulator.infer(case.clamps)
            results.append((values(network), []))
    (before, taught), (after, taught_after) = results
    for name, expected in before.items():
        assert close(after[name], expected), name
    for step, other in zip(taught, taught_after, strict=True):
        for name, expected_gradient in step.items():
            got = other[name]
            assert (got is None) == (expected_gradient is None), name
            assert got is None or expected_gradient is None or close(got, expected_gradient), name


def one_sample(clamps: verify.NamedClamps, index: int) -> verify.NamedClamps:
    """What is given of one sample."""

    def cut(given: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        if not isinstance(given, tuple):
            return given[index : index + 1]
        value, mask = given
        return value[index : index + 1], mask[index : index + 1] if mask.dim() == value.dim() else mask

    return {name: cut(given) for name, given in clamps.items()}


@thorough
@given(
    case=verify.cases(SMALL, rules=LOCAL_RULES[:1], momentum=False, most_steps=1),
    engine=st.sampled_from(("batched", "reference")),
)
def test_a_relaxation_goes_on_where_the_last_one_ended_or_where_it_is_put(case: Case, engine: str) -> None:
    """Nine steps are four, and five from there, on any graph."""
    net = case.network

    def relaxed(steps: int, start: str = "zeros") -> pcsim.Relaxation:
        return pcsim.Relaxation(steps, 0.1, start=start)

    sim = pcsim.Simulator(net, relaxed(9), engine=engine)
    sim.infer(case.clamps)
    expected = values(net)
    sim.relaxation = relaxed(4, "previous")
    fresh = pcsim.Simulator(net, relaxed(4, "previous"), engine=engine)
    fresh.infer(case.clamps)
    there = values(net)
    fresh.relaxation = relaxed(5, "previous")
    fresh.infer(case.clamps)
    for name, value in values(net).items():
        assert close(value, expected[name]), name
    put = pcsim.Simulator(net, relaxed(5), engine=engine)
    put.infer(case.clamps, init={name: there[name] for name in case.free})
    for name, value in values(net).items():
        assert close(value, expected[name]), name


@thorough
@given(case=verify.cases(SMALL, rules=LOCAL_RULES[:2], most_steps=3, targets=True))
def test_a_sample_does_not_depend_on_the_batch_and_gradients_are_means_over_it(case: Case) -> None:
    assume(case.batch > 1 and teaches(case))
    simulator = case.simulator()
    simulator.infer(case.clamps)
    simulator.compute_gradients()
    together, taught = values(case.network), gradients(case.network)
    sums = {name: torch.zeros_like(gradient) for name, gradient in taught.items() if gradient is not None}
    for index in range(case.batch):
        simulator.infer(one_sample(case.clamps, index))
        simulator.compute_gradients()
        for name, node in case.network.nodes.items():
            assert close(node.value, together[name][index : index + 1]), name
        for name, gradient in gradients(case.network).items():
            assert (gradient is None) == (name not in sums), name
            if gradient is not None:
                sums[name] += gradient / case.batch
    for name, total in sums.items():
        assert close(total, taught[name]), name


# Learning rules


@thorough
@given(case=verify.cases(SMALL, rules=LOCAL_RULES[:1], targets=True))
def test_forward_rule_is_the_settled_rule_without_relaxation(case: Case) -> None:
    assume(teaches(case))
    at_once = attrs.evolve(case.relaxation, steps=0, precision=pcsim.Constant())
    found = []
    for rule in (pcsim.SettledUpdate(), pcsim.ForwardUpdate()):
        simulator = pcsim.Simulator(case.network, at_once, rule)
        simulator.infer(case.clamps)
        simulator.compute_gradients()
        found.append(gradients(case.network))
    settled, forward = found
    for name, gradient in settled.items():
        other = forward[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or other is None or torch.equal(gradient, other), name


GAUSSIAN = verify.networks(nodes=(2, 5), cycles=False, cross_entropy=False)


@thorough
@given(case=verify.cases(GAUSSIAN, rules=LOCAL_RULES, most_steps=3, targets=True, partial=False))
def test_zero_output_error_is_a_fixed_point(case: Case) -> None:
    roots = {name: given for name, given in case.clamps.items() if not case.network[name].predicted}
    assume(roots and teaches(case))
    for engine in ENGINES:
        forward = case.simulator(engine).predict(roots)
        matching = {name: given if name in roots else forward[name] for name, given in case.clamps.items()}
        recorder = verify.RecordingOptimizer(case.network, 0.0)
        case.simulator(engine).update(matching, recorder)
        for name, node in case.network.nodes.items():
            assert close(node.value, forward[name], 1e-12), name
        for name, gradient in ((name, gradient) for step in recorder.gradients for name, gradient in step.items()):
            # A learned precision still has −½ log π to descend.
            assert gradient is None or "log_precision" in name or close(gradient, 0 * gradient, 1e-12), name


@thorough
@given(case=verify.cases(GAUSSIAN, rules=[pcsim.IncrementalUpdate()], targets=True, partial=False))
def test_incremental_rule_leaves_alone_what_no_error_has_reached(case: Case) -> None:
    assume(teaches(case))
    for engine in ENGINES:
        own = case.copy()
        recorder = verify.RecordingOptimizer(own.network, 0.01)
        own.simulator(engine).update(own.clamps, recorder)
        arrival = arrivals(own)
        for step, taught in enumerate(recorder.gradients):
            for name, _ in own.network.named_parameters():
                if step < arrival.get(name, len(recorder.gradients)):
                    assert taught[name] is None, f"{name} at step {step}"


def arrivals(case: Case) -> dict[str, int]:
    """First step at which an error can be at a node that a parameter serves, by breadth-first search; by name.

    At every step an error moves its node and the free nodes that its prediction reads, and teaches its parameters;
    from the next step on there can be an error wherever a prediction reads any of those.
    """
    network, reads = case.network, {name: reading(case, name) for name in case.network.nodes}
    serves = {name: parameters_of(network, {name} | (reads[name] & case.deterministic)) for name in network.nodes}
    first = {name: 0 for name in case.clamps if network[name].predicted}
    frontier, step = set(first), 0
    while frontier:
        step += 1
        moved = {n for p in frontier for n in reads[p] | {p} if n in case.free}
        taught = {parameter for p in frontier for parameter in serves[p]}
        live = moved | {n for n in network.nodes if reads[n] & moved or serves[n] & taught}
        frontier = {n for n in live if n not in first and n not in case.deterministic}
        first.update(dict.fromkeys(frontier, step))
    found: dict[str, int] = {}
    for node, arrival in first.items():
        for parameter in serves[node]:
            found[parameter] = min(found.get(parameter, arrival), arrival)
    return found


def reading(case: Case, name: str) -> set[str]:
    """Nodes that a prediction reads, directly and through deterministic nodes."""
    found: set[str] = set()
    frontier = [edge.source_name for edge in case.network.incoming(name)]
    while frontier:
        source = frontier.pop()
        if source not in found:
            found.add(source)
            if source in case.deterministic:
                frontier += [edge.source_name for edge in case.network.incoming(source)]
    return found


def parameters_of(network: pcsim.Network, nodes: set[str]) -> set[str]:
    """Names of the parameters of these nodes and of the edges into them."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    parts = [part for name in nodes for part in (network[name], *network.incoming(name))]
    return {names[id(parameter)] for part in parts for parameter in part.parameters()}


# Failed calls


def unknown_node(case: Case, simulator: pcsim.Simulator, optimizer: optim.Optimizer) -> None:
    simulator.infer({**case.clamps, "nobody": torch.zeros(case.batch, 1, dtype=torch.float64)})


def not_a_number(case: Case, simulator: pcsim.Simulator, optimizer: optim.Optimizer) -> None:
    name = next(iter(case.clamps))
    value = torch.full((case.batch, *case.network[name].shape), float("nan"), dtype=torch.float64)
    simulator.infer({**case.clamps, name: value})


def wrong_shape(case: Case, simulator: pcsim.Simulator, optimizer: optim.Optimizer) -> None:
    simulator.infer({**case.clamps, next(iter(case.clamps)): torch.zeros(case.batch, 7, 7, dtype=torch.float64)})


def nothing_clamped(case: Case, simulator: pcsim.Simulator, optimizer: optim.Optimizer) -> None:
    simulator.infer({})


def diverging_inference(case: Case, simulator: pcsim.Simulator, optimizer: optim.Optimizer) -> None:
    simulator.relaxation = pcsim.Relaxation(8, 1e200)
    simulator.infer(case.clamps)


def diverging_update(case: Case, simulator: pcsim.Simulator, optimizer: optim.Optimizer) -> None:
    simulator.rule, simulator.relaxation = pcsim.IncrementalUpdate(), pcsim.Relaxation(8, 1e200)
    simulator.update(case.clamps, optimizer)


def diverges(case: Case, fail: Callable[[Case, pcsim.Simulator, optim.Optimizer], None]) -> bool:
    """Whether anything moves, so that a rate beyond all measure throws it out of bounds."""
    own = case.copy()
    try:
        fail(own, own.simulator("reference"), optim.Adam(own.network.parameters(), lr=0.01))
    except DivergenceError:
        return True
    return False


FAILURES = (unknown_node, not_a_number, wrong_shape, nothing_clamped, diverging_inference, diverging_update)


@pytest.mark.parametrize("engine", ENGINES)
@thorough
@given(case=verify.cases(NETWORKS, rules=LOCAL_RULES[:2], most_steps=2), fail=st.sampled_from(FAILURES))
def test_a_failed_call_leaves_everything_as_it_was(
    engine: str, case: Case, fail: Callable[[Case, pcsim.Simulator, optim.Optimizer], None]
) -> None:
    simulator = case.simulator(engine)
    optimizer = optim.Adam(case.network.parameters(), lr=0.01) if list(case.network.parameters()) else None
    simulator.infer(case.clamps)
    if optimizer is not None and teaches(case):
        simulator.learn(optimizer)
    assume(optimizer is not None and (fail is not diverging_update or teaches(case)))
    assert optimizer is not None
    state = values(case.network)
    shown = {name: edge.message.clone() for name, edge in case.network.edges.items()}
    weights = copy.deepcopy(case.network.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())
    if fail in (diverging_inference, diverging_update):
        assume(diverges(case, fail))  # where nothing moves, nothing diverges
    with pytest.raises(PCError):
        fail(case, simulator, optimizer)
    for name, node in case.network.nodes.items():
        assert torch.equal(node.value, state[name]), name
    for name, edge in case.network.edges.items():
        assert torch.equal(edge.message, shown[name]), name
    for name, weight in case.network.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    after = optimizer.state_dict()
    assert after["param_groups"] == moments["param_groups"]
    assert after["state"].keys() == moments["state"].keys()
    for index, kept in moments["state"].items():
        for name, moment in kept.items():
            assert torch.equal(after["state"][index][name], moment), name


# Graphs


@thorough
@given(case=verify.cases(ACYCLIC))
def test_levels_are_the_longest_paths(case: Case) -> None:
    targets = [name for name in case.clamps if case.network[name].incoming]
    trace = case.simulator().infer(case.clamps)
    if not case.rule.backprop:
        assert dict(trace.levels) == verify.brute_force_levels(case.network, targets, case.deterministic)
    deterministic = {name for name, node in case.network.nodes.items() if node.deterministic} - set(targets)
    assert case.network.levels(targets) == verify.brute_force_levels(case.network, targets, deterministic)


@thorough
@given(case=verify.cases(verify.networks(), most_steps=2))
def test_printed_code_rebuilds_the_case(case: Case) -> None:
    rebuilt: dict[str, object] = {}
    exec(repr(case), rebuilt)
    network, clamps = rebuilt["net"], rebuilt["clamps"]
    assert isinstance(network, pcsim.Network)
    assert rebuilt["relaxation"] == case.relaxation
    assert rebuilt["rule"] == case.rule
    other = Case(network, clamps, case.relaxation, case.rule)  # type: ignore[arg-type]
    assert repr(other) == repr(case)
    case.simulator().infer(case.clamps)
    other.simulator().infer(other.clamps)
    for name, node in case.network.nodes.items():
        assert torch.equal(network[name].value, node.value), name
