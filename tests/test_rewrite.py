"""Auxiliary nodes: where they go, that they change no prediction, and that they delay and do nothing else."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pcsim
from pcsim import Network, PrecisionWarning, Relaxation, Simulator, Spiking, balance_paths, is_auxiliary, verify
from pcsim.dynamics.inference import check_delay
from pcsim.errors import GraphError, SettingError
from pcsim.graph.energy import LearnedPrecision
from pcsim.topologies import mlp, residual_mlp, resnet

RATE = 0.8
UNITS = 3


class Ordered(nn.Module):
    """Combines any number of inputs in a way that depends on their order."""

    def forward(self, *contributions: Tensor) -> Tensor:
        return sum(torch.tanh(c) / (place + 1) for place, c in enumerate(contributions))


@st.composite
def short_cuts(draw: st.DrawFn) -> Network:
    """Chains with many identity and other edges across them, parallel ones and deterministic nodes included."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    count = draw(st.integers(3, 7))
    across = st.tuples(st.integers(0, count - 2), st.integers(1, count - 1)).filter(lambda ends: ends[0] < ends[1])
    ends = [*((k, k + 1) for k in range(count - 1)), *draw(st.lists(across, max_size=6))]
    net = Network()
    for k in range(count):
        deterministic = 0 < k < count - 1 and draw(st.booleans())
        combine = draw(st.sampled_from((None, Ordered())))
        transfer = draw(st.sampled_from((None, nn.Tanh())))
        net.add_node(f"n{k}", (UNITS,), deterministic=deterministic, combine=combine, transfer=transfer)
    for source, target in ends:
        module = draw(st.sampled_from((nn.Identity(), nn.Identity(), nn.Linear(UNITS, UNITS))))
        net.add_edge(f"n{source}", f"n{target}", module, gain=draw(st.sampled_from((1.0, 1.0, 0.5))))
    return net.double()


def random_clamps(net: Network, names: list[str], batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, *net[name].shape, generator=generator, dtype=torch.float64) for name in names}


def ends_of(net: Network) -> list[str]:
    return [node.name for node in (*net.roots(), *net.sinks())]


def spiking(steps: int, rate: float = RATE) -> Relaxation:
    return Relaxation(steps, rate, precision=Spiking(alpha=0.0))


def auxiliaries(net: Network) -> list[str]:
    return [name for name, node in net.nodes.items() if is_auxiliary(node)]


def origin(edge: pcsim.Edge) -> tuple[str, nn.Module | str, float]:
    """Source, module and gain of the edge of the given network that a chain of auxiliary nodes stands for."""
    hops = [edge]
    while is_auxiliary(hops[-1].source):
        hops += hops[-1].source.incoming
    *others, first = hops
    assert all(type(hop.module) is nn.Identity and hop.gain == 1.0 for hop in others)
    return first.source_name, "identity" if type(first.module) is nn.Identity else first.module, first.gain


# Structure


@settings(max_examples=80, deadline=None)
@given(st.one_of(verify.networks(cycles=False), short_cuts()), st.booleans(), st.sampled_from((0.25, 0.8, 1.0)))
def test_every_edge_spans_one_level_and_nothing_else_changes(net: Network, share: bool, rate: float) -> None:
    printed, revision, levels = str(net), net.revision, net.levels()
    incoming = {name: list(node.incoming) for name, node in net.nodes.items()}
    balanced = balance_paths(net, rate, share=share)

    assert (str(net), net.revision, net.levels()) == (printed, revision, levels)
    assert {name: list(node.incoming) for name, node in net.nodes.items()} == incoming

    assert balanced.unequal_paths() == []
    new_levels = balanced.levels()
    assert {name: new_levels[name] for name in net.nodes} == levels
    for edge in balanced.edges.values():
        hop = 0 if edge.target.deterministic else 1
        assert new_levels[edge.source_name] - new_levels[edge.target_name] == hop

    for name, node in net.nodes.items():
        copied = balanced[name]
        assert not is_auxiliary(node)
        for same in ("transfer", "combine", "energy_function", "energy_weight", "deterministic", "log_precision"):
            assert getattr(copied, same) is getattr(node, same) or getattr(copied, same) == getattr(node, same)
        for tensor in ("own_precision", "prior"):
            torch.testing.assert_close(getattr(copied, tensor), getattr(node, tensor), rtol=0, atol=0)
        assert [origin(edge) for edge in copied.incoming] == [origin(edge) for edge in node.incoming]
    for name in auxiliaries(balanced):
        (edge,) = balanced[name].incoming
        assert balanced[name].energy_weight == (1 / rate if type(edge.module) is nn.Identity else 1.0)
        assert not balanced[name].deterministic
        assert balanced[name].outgoing
    apart = [(levels[e.source_name] - levels[e.target_name], e.target.deterministic) for e in net.edges.values()]
    lacking = sum(span - (0 if through else 1) for span, through in apart)
    assert len(auxiliaries(balanced)) == lacking if not share else len(auxiliaries(balanced)) <= lacking
    assert list(map(id, balanced.parameters())) == list(map(id, net.parameters()))
    assert list(balanced.state_dict()) == list(net.state_dict())


@settings(max_examples=50, deadline=None)
@given(st.one_of(verify.networks(cycles=False, priors=False), short_cuts()), st.booleans())
def test_the_forward_pass_stays(net: Network, share: bool) -> None:
    roots = random_clamps(net, [node.name for node in net.roots()])
    before, after = Simulator(net).predict(roots), Simulator(balance_paths(net, RATE, share=share)).predict(roots)
    for name in net.nodes:
        torch.testing.assert_close(after[name], before[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ResNet10", "ResNet18"])
def test_resnet_becomes_the_published_one(name: str) -> None:
    with torch.device("meta"):
        net = resnet(name, width=1 / 8)
        balanced = balance_paths(net, RATE)
    z = "stem"
    blocks = 4 if name == "ResNet10" else 8
    changing = {2, 3, 4} if name == "ResNet10" else {3, 5, 7}
    expected = []
    for k in range(1, blocks + 1):
        stride = 2 if k in changing else 1
        convolution = (nn.Conv2d, (1, 1), (stride, stride), None)
        expected += [
            (f"main{k}a", z, (nn.GELU, nn.Conv2d, (3, 3), (stride, stride), None), 1.0),
            (f"main{k}b", f"main{k}a", (nn.GELU, nn.Conv2d, (3, 3), (1, 1), None), 1.0),
            (f"skip{k}/aux1", z, *((convolution, 1.0) if k in changing else ((nn.Identity,), 1 / RATE))),
            (f"skip{k}/aux2", f"skip{k}/aux1", (nn.Identity,), 1 / RATE),
        ]
        z = f"sum{k}"
        assert balanced[z].deterministic
        assert [e.source_name for e in balanced[z].incoming] == [f"main{k}b", f"skip{k}/aux2"]
        assert all(type(e.module) is nn.Identity for e in balanced[z].incoming)
    found = []
    for node in balanced.nodes.values():
        if node.deterministic or node.name in ("input", "stem", "output"):
            continue
        (edge,) = node.incoming
        assert isinstance(node.transfer, nn.Identity)
        module: list[object] = []
        for part in edge.module if isinstance(edge.module, nn.Sequential) else [edge.module]:
            module.append(type(part))
            if isinstance(part, nn.Conv2d):
                module += [part.kernel_size, part.stride, part.bias]
        found.append((node.name, edge.source_name, tuple(module), node.energy_weight))
    assert sorted(found) == sorted(expected)
    assert balanced.levels()["input"] == int(name.removeprefix("ResNet"))
    assert len(auxiliaries(balanced)) == 2 * blocks


def test_the_two_networks_load_each_others_states() -> None:
    net = resnet([1, 1], width=1 / 32, batch_norm=True)
    balanced = balance_paths(net, RATE)
    other = resnet([1, 1], width=1 / 32, batch_norm=True)
    other.load_state_dict(balanced.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), net.parameters(), strict=True))
    balance_paths(other, RATE).load_state_dict(net.state_dict())


def fan() -> Network:
    """One source, a long chain, and identity edges that leave the source for several places of the chain."""
    net = mlp([UNITS] * 6)
    for target in ("hidden3", "hidden4", "hidden4", "output"):
        net.add_edge("hidden1", target)
    net.add_edge("hidden1", "hidden4", gain=0.5)
    net.add_edge("hidden1", "hidden4", nn.Linear(UNITS, UNITS))
    return net


def test_identity_edges_of_one_source_and_gain_share_a_chain() -> None:
    shared, separate = balance_paths(fan(), RATE), balance_paths(fan(), RATE, share=False)
    assert sorted(auxiliaries(shared)) == [
        *(f"hidden1->hidden3/aux{k}" for k in (1, 2, 3)),
        *(f"hidden1->hidden4#{edge}/aux{k}" for edge in (3, 4) for k in (1, 2)),
    ]
    for target, places in {"hidden3": [1], "hidden4": [2, 2], "output": [3]}.items():
        sources = [edge.source_name for edge in shared[target].incoming]
        assert [name for name in sources if "hidden3/aux" in name] == [f"hidden1->hidden3/aux{k}" for k in places]
    assert len(auxiliaries(separate)) == 1 + 2 + 2 + 3 + 2 + 2


def test_a_balanced_network_is_balanced_again_without_a_change() -> None:
    once = balance_paths(fan(), RATE)
    again = balance_paths(once, RATE)
    assert str(again) == str(once)
    once.remove_edge("hidden1->hidden3")
    once.add_edge("hidden1", "output", name="hidden1->hidden3")
    later = balance_paths(once, RATE, share=False)
    assert later.unequal_paths() == []
    assert [name for name in auxiliaries(later) if name not in once] == [f"hidden1->hidden3'/aux{k}" for k in (1, 2, 3)]


def test_levels_count_from_the_targets_that_are_named() -> None:
    net = mlp([UNITS] * 5)
    net.add_edge("hidden1", "hidden3", name="skip")
    net.add_edge("hidden3", "output", name="parallel")
    assert auxiliaries(balance_paths(net, RATE, targets=["hidden3"])) == ["skip/aux1"]
    assert auxiliaries(balance_paths(net, RATE, targets=[net["hidden2"]])) == []
    assert auxiliaries(balance_paths(net, RATE, targets=["hidden1", "output"])) == []


def test_a_deterministic_target_takes_a_hop() -> None:
    net = mlp([UNITS] * 3)
    total = net.add_node("total", (UNITS,), deterministic=True)
    net.add_edge("output", total)
    net.add_edge("hidden1", total, name="skip")
    assert auxiliaries(balance_paths(net, RATE)) == ["skip/aux1"]


def test_a_learned_precision_and_a_learned_prior_are_shared() -> None:
    net = Network()
    prior = nn.Parameter(torch.zeros(UNITS))
    net.add_node("root", (UNITS,), prior=prior, precision=LearnedPrecision(2.0, per_unit=True))
    net.add_node("given", (UNITS,), precision=torch.tensor([1.0, 2.0, 3.0]))
    net.add_edge("root", "given")
    balanced = balance_paths(net, RATE)
    assert balanced["root"].prior is prior
    assert balanced["root"].log_precision is net["root"].log_precision
    assert torch.equal(balanced["given"].own_precision, torch.tensor([1.0, 2.0, 3.0]))


def test_what_cannot_be_balanced_is_refused() -> None:
    net = mlp([UNITS] * 4)
    with pytest.raises(SettingError, match="rate 0 given"):
        balance_paths(net, 0)
    with pytest.raises(GraphError, match="node 'nobody' is not in the network"):
        balance_paths(net, RATE, targets=["nobody"])
    net.add_edge("hidden2", "hidden1")
    with pytest.raises(GraphError, match="hidden1 -> hidden2 -> hidden1 is a cycle"):
        balance_paths(net, RATE)


class Fading(pcsim.PrecisionSchedule):
    """Twice the usual at the arrival, and seven tenths of it from step to step."""

    def at(self, step: int, level: int | None, steps: int) -> float:
        late = step - (level or 0)
        return 0.0 if late < 0 else 2.0 * 0.7**late


def test_a_peak_that_fades_slowly_is_a_peak() -> None:
    net = mlp([UNITS] * 4)
    net.add_edge("hidden1", "output", name="skip")
    relaxation = Relaxation(5, 0.3, precision=Fading())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_delay(balance_paths(net, 0.3, peak=2.0), relaxation)
    with pytest.warns(PrecisionWarning, match=r"balance_paths\(net, 0.3, peak=2\)"):
        check_delay(balance_paths(net, 0.3), relaxation)


# Dynamics


def arrivals(net: Network, clamps: dict[str, Tensor]) -> dict[str, int]:
    """Inference steps after which each node first differs from its forward value."""
    found: dict[str, int] = {}
    simulator = Simulator(net, engine="reference")
    for steps in range(max(net.levels().values()) + 1):
        simulator.relaxation = spiking(steps)
        simulator.infer(clamps)
        for name, node in net.nodes.items():
            if name not in clamps and name not in found and not torch.equal(node.value, node.forward_value):
                found[name] = steps
    return found


@pytest.mark.filterwarnings("ignore::pcsim.PrecisionWarning")
@settings(max_examples=30, deadline=None)
@given(short_cuts(), st.booleans())
def test_an_error_arrives_exactly_at_the_level(net: Network, share: bool) -> None:
    balanced = balance_paths(net, RATE, share=share)
    clamps = random_clamps(net, [node.name for node in net.sinks()])
    levels = balanced.levels()
    assert arrivals(balanced, clamps) == {name: level for name, level in levels.items() if name not in clamps}


@pytest.mark.filterwarnings("ignore::pcsim.PrecisionWarning")
def test_residual_networks_need_auxiliary_nodes_for_that() -> None:
    torch.manual_seed(0)
    for net in (residual_mlp(4, 5, 3, blocks=2), resnet([1, 1], image=(2, 4, 4), width=1 / 32, classes=3)):
        net.double()
        clamps = random_clamps(net, ["output"])
        # The others are reached by nodes that push at their own level alone, although too early themselves.
        early = {name for name, step in arrivals(net, clamps).items() if step < net.levels()[name]}
        assert early == {"stem", "main1b", "sum1"}
        balanced = balance_paths(net, RATE)
        expected = {name: level for name, level in balanced.levels().items() if name != "output"}
        assert arrivals(balanced, clamps) == expected


@settings(max_examples=40, deadline=None)
@given(short_cuts(), st.sampled_from((pcsim.ForwardUpdate(), pcsim.SettledUpdate())))
def test_a_shared_chain_equals_chains_of_their_own(net: Network, rule: pcsim.LearningRule) -> None:
    seen = []
    for share in (True, False):
        balanced = balance_paths(net, RATE, share=share)
        simulator = Simulator(balanced, spiking(max(net.levels().values()) + 1), rule, engine="reference")
        simulator.infer(random_clamps(net, ends_of(net)))
        simulator.compute_gradients()
        values = [balanced[name].value for name in net.nodes]
        seen.append(values + [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()])
    for shared, separate in zip(*seen, strict=True):
        torch.testing.assert_close(shared, separate, rtol=1e-10, atol=1e-12)


def test_a_shared_chain_shows_the_targets_each_others_pull_under_lasting_precision() -> None:
    values = []
    for share in (True, False):
        torch.manual_seed(0)
        net = fan().double()
        balanced = balance_paths(net, RATE, share=share)
        simulator = Simulator(balanced, Relaxation(8, RATE, precision=Spiking(alpha=0.1)), engine="reference")
        simulator.infer(random_clamps(net, ends_of(net)))
        values.append(balanced["hidden3"].value)
    assert (values[0] - values[1]).abs().max() > 1e-4


@pytest.mark.parametrize("engine", ["reference", "batched"])
@pytest.mark.parametrize("rate", [0.3, 0.8, 1.0])
def test_an_identity_chain_is_a_pure_delay(rate: float, engine: str) -> None:
    torch.manual_seed(0)
    net = mlp([UNITS] * 7).double()
    net.add_edge("hidden1", "output", name="skip")
    silent = net["output"].incoming[0].module
    nn.init.zeros_(silent.weight)
    nn.init.zeros_(silent.bias)
    balanced = balance_paths(net, rate)
    clamps = random_clamps(net, ["input", "output"])
    assert auxiliaries(balanced) == [f"skip/aux{k}" for k in range(1, 5)]
    simulator = Simulator(balanced, spiking(5, rate), pcsim.ForwardUpdate(), engine=engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrecisionWarning)
        simulator.infer(clamps)
    received = balanced["output"].value - balanced["output"].forward_prediction
    hidden = balanced["hidden1"]
    torch.testing.assert_close(hidden.value - hidden.forward_value, rate * received, rtol=1e-12, atol=1e-12)
    for name in auxiliaries(balanced)[1:]:
        torch.testing.assert_close(balanced[name].value, balanced[name].forward_value, rtol=1e-12, atol=1e-12)


def scaled(value: Tensor, factor: float) -> Tensor:
    """The value itself, through which a gradient passes multiplied by a factor."""
    return factor * value + (1 - factor) * value.detach()


def backprop_with_scaled_branches(net: Network, clamps: dict[str, Tensor], rate: float) -> list[Tensor]:
    """Gradients of a residual network in plain PyTorch, each hop of every branch passing back rate times as much."""

    def module(source: str, target: str) -> nn.Module:
        return net.edges[f"{source}->{target}"].module

    z, name = module("input", "stem")(clamps["input"]), "stem"
    for k in range(1, sum(node.startswith("sum") for node in net.nodes) + 1):
        first = module(name, f"main{k}a")(scaled(z, rate))
        gain = net.edges[f"main{k}a->main{k}b"].gain
        z, name = z + gain * module(f"main{k}a", f"main{k}b")(scaled(first, rate)), f"sum{k}"
    difference = clamps["output"] - module(name, "output")(z)
    energy = 0.5 * difference.square().sum() / len(difference)
    return list(torch.autograd.grad(energy, list(net.parameters())))


@pytest.mark.parametrize("engine", ["reference", "batched"])
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["mlp", "convolutional"])
def test_residual_stacks_learn_as_backprop_with_scaled_branches(kind: str, rate: float, engine: str) -> None:
    torch.manual_seed(0)
    net = (
        residual_mlp(4, 5, 3, blocks=3, gain=0.7)
        if kind == "mlp"
        else resnet([3], image=(2, 4, 4), width=1 / 32, classes=3)
    ).double()
    clamps = random_clamps(net, ["input", "output"], batch=4)
    balanced = balance_paths(net, rate)
    simulator = Simulator(balanced, spiking(9, rate), pcsim.ForwardUpdate(), engine=engine)
    simulator.infer(clamps)
    simulator.compute_gradients()
    into_target = {id(p) for p in net["output"].incoming[0].parameters()}
    expected = backprop_with_scaled_branches(net, clamps, rate)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        factor = 1.0 if id(parameter) in into_target else (1 - rate) * rate
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(parameter.grad, factor * gradient, rtol=1e-9, atol=1e-13)


# The warning


@pytest.mark.parametrize(
    ("relaxation", "message"),
    [
        (Relaxation(9, RATE), "Constant.* lasts after the error has arrived"),
        (Relaxation(9, RATE, precision=Spiking.as_covariance(RATE)), "Spiking.*lasts after"),
        (Relaxation(9, RATE, precision=Spiking(), momentum=0.5, nesterov=True), "Nesterov"),
        (Relaxation(9, RATE, precision=Spiking(), momentum=0.5), None),
        (Relaxation(9, RATE, precision=pcsim.Decaying()), None),
        (Relaxation(9, RATE, precision=pcsim.Constant(0.1)), None),
        (Relaxation(9, 0.5), "but the relaxation has rate 0.5; give both the same rate"),
    ],
)
def test_a_delay_that_does_not_delay_is_told(relaxation: Relaxation, message: str | None) -> None:
    net = residual_mlp(4, 5, 3, blocks=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_delay(net, relaxation)
        if message is None:
            check_delay(balance_paths(net, RATE), relaxation)
    if message is not None:
        with pytest.warns(PrecisionWarning, match=rf"'skip1/aux1', 'skip1/aux2'(.|\n)*{message}"):
            check_delay(balance_paths(net, RATE), relaxation)


def test_constant_precision_diverges_on_a_chain_of_auxiliary_nodes() -> None:
    torch.manual_seed(0)
    net = residual_mlp(4, 5, 3, blocks=2).double()
    balanced = balance_paths(net, RATE)
    moved = []
    for graph, relaxation in ((net, Relaxation(60, RATE / 2)), (balanced, Relaxation(60, RATE))):
        expected = pytest.warns(PrecisionWarning, match="skip1/aux1") if graph is balanced else nullcontext()
        with expected:
            Simulator(graph, relaxation, engine="reference").infer(random_clamps(graph, ["input", "output"]))
        moved.append((graph["stem"].value - graph["stem"].forward_value).abs().max().item())
    assert moved[0] < 10
    assert moved[1] > 1e6
