"""CUDA graphs without a GPU: a stand-in that keeps to their rules plays back what every program calls.

As a device does, it captures operations in place of computing them, computes them again on the tensors that they had,
and refuses what a device cannot capture: numbers that are read from it, or brought to it from the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_devices import CASES, NETWORKS, RELAXATIONS, RULES, batch_of, with_transfer
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import pcsim
from pcsim import verify
from pcsim.engine.batched import playback
from pcsim.engine.kernels import kernel as kernels
from pcsim.errors import DivergenceError, StateError

aten = torch.ops.aten
UNCAPTURED = (aten._local_scalar_dense.default, aten.lift_fresh.default, aten.scalar_tensor.default)
"""What reads a number from a device, or brings one there."""


class StandIn(TorchDispatchMode):
    """A device's graph on the CPU: what it captures leaves no trace, and what it makes holds nothing until replayed."""

    made: list[StandIn] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        assert device.type == "cpu"
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        self.made.append(self)

    def capture(self, work: Callable[[], object]) -> None:
        with self:
            work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in UNCAPTURED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        named = {**dict(zip((each.name for each in func._schema.arguments), args, strict=False)), **kwargs}
        written = [each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
        leaves = [leaf for name in written for leaf in tree_leaves(named.get(name)) if leaf is not None]
        before = [(tensor, tensor.clone()) for tensor in leaves]
        made = func(*args, **kwargs)
        for tensor, content in before:
            tensor.copy_(content)
        there = {tensor.untyped_storage().data_ptr() for tensor in given}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in there:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        # As it lies in memory now, wherever a parameter may be put later.
        there_now = partial(tree_map_only, Tensor, Tensor.detach)
        self._calls.append((func, there_now(args), there_now(kwargs), made))
        return made

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode():
            for func, args, kwargs, made in self._calls:
                for kept, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                        kept.copy_(new)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StandIn]]:
    monkeypatch.setitem(playback.GRAPHS, "cpu", StandIn)
    StandIn.made.clear()
    yield StandIn.made
    StandIn.made.clear()


# What is played back is what is called

BETWEEN = {
    "incremental": "the weights learn",
    "sampling": "noise is drawn (temperature)",
    "multipliers": "multipliers grow",
}
BY_AUTOGRAD = ("cyclic", "tokens", "attention", "resnet", "bilinear, by autograd")


def reason(network: str, rule: str) -> str:
    """Why a program is not captured."""
    if rule in BETWEEN:
        return f"something happens between two steps: {BETWEEN[rule]}"
    return "autograd computes" if network in BY_AUTOGRAD else "a module may draw" if network == "dropout" else ""


def numbered(net: pcsim.Network, device: str | torch.device, number: int) -> dict[str, Tensor]:
    """A batch that differs from the others, of the network's dtype."""
    dtype = next(net.parameters()).dtype
    clamps = batch_of(net, device)
    return {name: v.to(dtype) + 0.1 * number if v.is_floating_point() else v for name, v in clamps.items()}


def simulator(net: pcsim.Network, *rules: Any, graphs: bool, **options: Any) -> pcsim.Simulator:
    return pcsim.Simulator(net, *rules, engine=partial(pcsim.BatchedEngine, cuda_graphs=graphs), **options)


@pytest.mark.device
@pytest.mark.filterwarnings("ignore::pcsim.PCWarning")
@pytest.mark.parametrize(("network", "rule"), CASES)
def test_what_is_played_back_is_what_is_called(
    network: str, rule: str, device: torch.device, stand_in: list[StandIn]
) -> None:
    left = []
    for graphs in (False, True):
        torch.manual_seed(0)
        net, (relaxation, learns) = NETWORKS[network]().double().to(device), {**RULES, **RELAXATIONS}[rule]
        sim, found = simulator(net, relaxation, learns, graphs=graphs), list[Tensor]()
        optimizer = SGD(net.parameters(), lr=1e-3)
        for number in range(5):
            clamps = numbered(net, device, number)
            sim.update(clamps, optimizer)
            found += [node.value.clone() for node in net.nodes.values()]
            found += [node.error.clone() for node in net.nodes.values() if node.incoming]
            found += [value.clone() for value in sim.predict({"input": clamps["input"]}).values()]
        left.append([*found, *net.state_dict().values()])
        assert graphs or not stand_in
    for called, played in zip(*left, strict=True):
        torch.testing.assert_close(played, called, rtol=0 if device.type == "cpu" else 1e-9, atol=1e-12)
    why = reason(network, rule)
    told = str(sim.program)
    assert f"none, since {why}" in told if why else "played back by the device" in told
    if not why and device.type == "cpu":
        assert sum(graph.replays for graph in stand_in) >= 3 + 1 + 4  # relaxations, learning, predictions
        assert not any(graph.replays == 0 for graph in stand_in)


def same_either_way(run: Callable[[bool], list[Tensor]], stand_in: list[StandIn], *, replays: int) -> None:
    """What a run leaves is the same with and without graphs, which have been replayed so often at least."""
    torch.manual_seed(0)
    called = run(False)
    assert not stand_in
    torch.manual_seed(0)
    played = run(True)
    assert sum(graph.replays for graph in stand_in) >= replays
    for one, other in zip(called, played, strict=True):
        assert torch.equal(one, other)


def hidden(net: pcsim.Network) -> list[Tensor]:
    return [net[name].value.clone() for name in ("hidden1", "hidden2")]


RELAXATION = pcsim.Relaxation(5, 0.3)


def test_what_is_given_changes_from_batch_to_batch(stand_in: list[StandIn]) -> None:
    """Masks, also of another shape, and precisions trial by trial."""

    def run(graphs: bool) -> list[Tensor]:
        net, found = pcsim.topologies.mlp([6, 8, 8, 3]), list[Tensor]()
        sim = simulator(net, RELAXATION, graphs=graphs)
        for number in range(12):
            shape = (4, 3) if number > 5 else (3,)
            clamps = {"input": torch.randn(4, 6), "output": (torch.randn(4, 3), torch.rand(shape) < 0.5)}
            sim.infer(clamps, precision={"hidden1": 0.5 + torch.rand(4)})
            found += [*hidden(net), net["output"].value.clone()]
        return found

    # Of twelve the first two of each program are called; whenever the shape differs it is captured anew.
    same_either_way(run, stand_in, replays=10)


def test_precisions_that_are_numbers_and_tensors(stand_in: list[StandIn]) -> None:
    """Nodes of one group, whose precisions are set anew, or moved, between batches."""

    def run(graphs: bool) -> list[Tensor]:
        net, found = pcsim.topologies.mlp([6, 8, 8, 8, 3]), list[Tensor]()
        net["hidden2"].precision, net["hidden3"].precision = torch.rand(8), pcsim.LearnedPrecision(0.5)
        sim = simulator(net, RELAXATION, graphs=graphs)
        optimizer = SGD(net.parameters(), lr=0.1)
        for number in range(16):
            sim.update({"input": torch.randn(4, 6), "output": torch.randn(4, 3)}, optimizer)
            if number == 5:
                net["hidden2"].own_precision.mul_(0.5)
            if number == 9:
                net["hidden1"].precision = 0.7
            found += [node.value.clone() for node in net.nodes.values()]
        return [*found, *net.state_dict().values()]

    same_either_way(run, stand_in, replays=20)


@pytest.mark.parametrize("network", ["chain", "images, normalised"])
def test_centred_nudging(network: str, stand_in: list[StandIn]) -> None:
    """Two runs of the same task, one nudged the other way."""

    def run(graphs: bool) -> list[Tensor]:
        net = NETWORKS[network]()
        sim = simulator(net, RELAXATION, graphs=graphs, nudging=pcsim.Nudging(0.5, centred=True))
        optimizer = SGD(net.parameters(), lr=0.1)
        for number in range(8):
            sim.update(numbered(net, "cpu", number), optimizer)
        return [*(node.value.clone() for node in net.nodes.values()), *net.state_dict().values()]

    same_either_way(run, stand_in, replays=24)


def test_learning_after_many_runs(stand_in: list[StandIn]) -> None:
    """What kernels keep of a run is that of the one that was played back."""

    def run(graphs: bool) -> list[Tensor]:
        net, found = NETWORKS["images, normalised"](), list[Tensor]()
        sim = simulator(net, RELAXATION, graphs=graphs)
        for number in range(14):
            sim.infer(numbered(net, "cpu", number))
            if number > 5:
                found += sim.gradients().values()
        return found

    same_either_way(run, stand_in, replays=18)


@pytest.mark.parametrize("how", ["data", "assign", "transposed"])
def test_weights_that_are_put_elsewhere(how: str, stand_in: list[StandIn]) -> None:
    def run(graphs: bool) -> list[Tensor]:
        net, found = pcsim.topologies.mlp([8, 8, 8, 8]), list[Tensor]()
        sim = simulator(net, RELAXATION, graphs=graphs)
        for number in range(12):
            sim.infer({"input": torch.randn(4, 8), "output": torch.randn(4, 8)})
            if number == 6 and how == "assign":
                net.load_state_dict({name: 2 * tensor for name, tensor in net.state_dict().items()}, assign=True)
            elif number == 6:
                for parameter in net.parameters():
                    if how == "data":
                        parameter.data = 2 * parameter.data
                    elif parameter.dim() == 2:  # the others stay where they are
                        parameter.data = parameter.data.mT
            found += hidden(net)
            if how != "assign" or number != 6:
                found += sim.gradients().values()
        return found

    same_either_way(run, stand_in, replays=15 if how == "assign" else 19)


@pytest.mark.filterwarnings("ignore:cuda_graphs.*energies are recorded")
def test_gradients_are_the_callers_own(stand_in: list[StandIn]) -> None:
    """Asked for twice, before and after other runs, and of a run whose weights have moved since."""

    def run(graphs: bool) -> list[Tensor]:
        net, found = pcsim.topologies.mlp([6, 8, 8, 8, 3]), list[Tensor]()
        sim = simulator(net, pcsim.Relaxation(6, 0.5, precision=pcsim.Spiking.for_rate(0.5)), pcsim.ArrivalUpdate(),
                        graphs=graphs)  # fmt: skip
        optimizer = SGD(net.parameters(), lr=0.1)
        for number in range(9):
            sim.infer({"input": torch.randn(4, 6), "output": torch.randn(4, 3)}, record=number == 5)
            if number % 3:
                sim.infer({"input": torch.randn(4, 6), "output": torch.randn(4, 3)})
            found += [*sim.gradients().values()]
            sim.learn(optimizer)
            found += [*sim.gradients().values()]
        return found

    same_either_way(run, stand_in, replays=19)


class Reading(kernels.Kernel[nn.Softsign]):
    """A kernel that reads a number on the host."""

    def forward(self, call: kernels.Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        return value / (1 + value.abs()) if value.abs().max().item() > 0 else value

    def message(
        self, call: kernels.Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None
    ) -> Tensor:
        return delta / (1 + value.abs()).square()


def test_what_cannot_be_captured_is_called(stand_in: list[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_KERNELS", dict(kernels._KERNELS))
    kernels.register(nn.Softsign, Reading())

    def network() -> pcsim.Network:
        torch.manual_seed(0)
        return with_transfer(nn.Softsign)()

    called, played = network(), network()
    sims = [simulator(net, RELAXATION, graphs=net is played) for net in (called, played)]
    for number in range(6):
        clamps = batch_of(called, "cpu")
        for sim in sims:
            if number in (2, 3) and sim.network is played:  # the third batch of a kind is the second of its program
                with pytest.warns(pcsim.PCWarning, match=r"cuda_graphs: operations are queued one.*not permitted"):
                    sim.update(clamps, SGD(sim.network.parameters(), lr=0.1))
            else:
                sim.update(clamps, SGD(sim.network.parameters(), lr=0.1))
        for one, other in zip(called.state_dict().values(), played.state_dict().values(), strict=True):
            assert torch.equal(one, other)
    assert "none, since an operation cannot be captured: operation not permitted" in str(sims[1].program)


class Cubic(pcsim.Energy):
    """A factor of a user's own, which may be set at any time."""

    factor = 1.0

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        return self.factor * (value - prediction).abs().pow(3)


def test_an_energy_of_a_users_own_is_not_captured(stand_in: list[StandIn]) -> None:
    net = pcsim.topologies.mlp([6, 8, 3])
    net["hidden1"].energy_function = Cubic()
    sim = simulator(net, RELAXATION, graphs=True)
    with pytest.warns(pcsim.PCWarning, match="hidden1.* may change, whose energy is of your own"):
        sim.infer(batch_of(net, "cpu"))
    assert not stand_in


def test_no_graphs_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(playback.GRAPHS, "cpu")
    net = pcsim.topologies.mlp([6, 8, 3])
    with pytest.warns(
        pcsim.PCWarning, match="queued one by one, since they are for 'cuda', and the network is on 'cpu'"
    ):
        simulator(net, RELAXATION, graphs=True).infer(batch_of(net, "cpu"))


def test_a_failed_batch_leaves_what_the_last_one_left(stand_in: list[StandIn]) -> None:
    net = pcsim.topologies.mlp([6, 8, 8, 3])
    sim, clamps = simulator(net, RELAXATION, graphs=True), batch_of(net, "cpu")
    for _ in range(5):
        sim.infer(clamps)
    before = hidden(net)
    with pytest.raises(DivergenceError):
        sim.infer({**clamps, "output": 1e30 * clamps["output"]})
    assert all(torch.equal(one, other) for one, other in zip(hidden(net), before, strict=True))
    replays = sum(graph.replays for graph in stand_in)
    sim.infer(clamps)
    torch.testing.assert_close(hidden(net), before)
    assert sum(graph.replays for graph in stand_in) == replays + 1


def test_measured_and_copied(stand_in: list[StandIn]) -> None:
    net = pcsim.topologies.mlp([6, 8, 8, 3])
    sim, clamps = simulator(net, RELAXATION, graphs=True), batch_of(net, "cpu")
    optimizer = SGD(net.parameters(), lr=0.1)
    for _ in range(6):
        sim.update(clamps, optimizer)
    replays = sum(graph.replays for graph in stand_in)
    profile = pcsim.diagnosis.profile(sim, clamps)
    assert all(each.calls for each in profile.measurements if each.stage != "learning")
    assert {each.stage for each in profile.measurements} == {"start", "predictions", "messages", "learning"}
    assert sum(graph.replays for graph in stand_in) >= replays
    other = copy.deepcopy(sim)
    other.infer(clamps)
    sim.infer(clamps)
    for name in net.nodes:
        assert torch.equal(other.network[name].value, net[name].value)


@pytest.mark.filterwarnings("ignore::pcsim.PCWarning")
@pytest.mark.parametrize("graphs", [15, pytest.param(150, marks=pytest.mark.slow)])
def test_random_networks_are_played_back(graphs: int, stand_in: list[StandIn]) -> None:
    def check(case: verify.Case) -> None:
        left = []
        for played in (False, True):
            sim = case.copy().simulator(partial(pcsim.BatchedEngine, cuda_graphs=played))
            torch.manual_seed(0)
            found = list[Tensor]()
            for _ in range(5):
                sim.infer(case.clamps)
                found += [node.value.clone() for node in sim.network.nodes.values()]
                with suppress(StateError):  # nothing to learn, or a rule that learns at every step
                    found += sim.gradients().values()
            left.append(found)
        for one, other in zip(*left, strict=True):
            assert torch.equal(one, other)

    graphs_of_kernels = verify.networks(
        combines=False,
        node_factory=lambda shape: {"transfer": nn.Tanh()},
        edge_factory=lambda source, contribution: nn.Linear(source[0], contribution[0]),
        node_shapes=st.tuples(st.integers(1, 4)),
    )
    drawn = given(verify.cases(graphs_of_kernels, rules=(*verify.RULES, pcsim.ArrivalUpdate())))(check)
    settings(
        max_examples=graphs, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )(drawn)()
    assert sum(graph.replays for graph in stand_in) > graphs
