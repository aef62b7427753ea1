"""A network driven through anything that users do, in any order; oracle: a fresh twin, run by the reference engine."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn, optim

import pcsim

LEARNING = (pcsim.SettledUpdate(), pcsim.ForwardUpdate(), pcsim.IncrementalUpdate(), pcsim.Backprop())
INNER = ("h1->h2", "h2->h3")
RELAXATIONS = (
    pcsim.Relaxation(6, 0.2),
    pcsim.Relaxation(6, 0.2, precision=pcsim.Spiking(0.0)),
    pcsim.Relaxation(5, 0.3, precision=pcsim.Spiking(0.1)),
    pcsim.Relaxation(4, 0.2, momentum=0.5),
    pcsim.Relaxation(12, 0.3, tolerance=0.1),
)
NUDGES = (None, pcsim.Nudging(0.4), pcsim.SoftNudging(-0.3), pcsim.Nudging(0.3, centred=True))


def build() -> pcsim.Network:
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("x", (4,))
    for name in ("h1", "h2", "h3"):
        net.add_node(name, (4,), transfer=nn.Tanh())
    net.add_node("sum", (4,), deterministic=True)
    net.add_node("y", (3,))
    for source, target in (("x", "h1"), ("h1", "h2"), ("h2", "h3")):
        net.add_edge(source, target, nn.Linear(4, 4))
    net.add_edge("h3", "sum")
    net.add_edge("h1", "sum", nn.Sequential(nn.SiLU(), nn.Linear(4, 4)))
    net.add_edge("sum", "y", nn.Linear(4, 3))
    return net.double()


class AnyOrder(RuleBasedStateMachine):
    """One simulator that is used for long, beside fresh copies that are used once."""

    @initialize(learning=st.sampled_from(LEARNING), relaxation=st.sampled_from(RELAXATIONS[:3]))
    def start(self, learning: pcsim.LearningRule, relaxation: pcsim.Relaxation) -> None:
        self.net, self.batch, self.kept = build(), 3, []
        self.sim = pcsim.Simulator(self.net, relaxation, learning)
        self.optimizer = optim.SGD(self.net.parameters(), 0.05)
        self.current, self.seed = False, 0

    @property
    def learning(self) -> pcsim.LearningRule:
        return self.sim.rule

    def given(self, seed: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        sizes = (("x", 4), ("y", 3))
        return {name: torch.randn(self.batch, size, generator=draw, dtype=torch.float64) for name, size in sizes}

    def compare(self, got: Tensor | None, expected: Tensor | None) -> None:
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)

    def twin(self) -> pcsim.Simulator:
        own, sim = copy.deepcopy(self.net), self.sim
        return pcsim.Simulator(own, sim.relaxation, sim.rule, nudging=sim.nudging, engine="reference")

    @rule(seed=st.integers(0, 3), record=st.booleans())
    def run(self, seed: int, record: bool) -> None:
        twin = self.twin()
        trace, expected = (each.infer(self.given(seed), record=record) for each in (self.sim, twin))
        if record:
            self.compare(trace.energies, expected.energies)
        assert trace.steps == expected.steps
        self.seed, self.current = seed, True
        self.compare_readings(twin.network)

    def compare_readings(self, other: pcsim.Network) -> None:
        for name, node in self.net.nodes.items():
            self.compare(node.value, other[name].value)
            if node.predicted:
                self.compare(node.error, other[name].error)
        for name, edge in self.net.edges.items():
            self.compare(edge.message, other.edges[name].message)

    @precondition(lambda self: self.current and not self.learning.every_step)
    @rule(how=st.sampled_from(("gradients", "compute", "learn", "learn again", "twice")))
    def learn(self, how: str) -> None:
        twin = self.twin()
        twin.infer(self.given(self.seed))
        expected = twin.gradients()
        if how == "gradients":
            found = self.sim.gradients()
            grads = [found.get(parameter) for parameter in self.net.parameters()]
        else:
            self.sim.compute_gradients()
            if how == "twice":
                self.sim.compute_gradients(accumulate=True)
            grads = [parameter.grad for parameter in self.net.parameters()]
        for got, parameter in zip(grads, twin.network.parameters(), strict=True):
            gradient = expected.get(parameter)
            self.compare(got, gradient if how != "twice" or gradient is None else 2 * gradient)
        if how in ("learn", "learn again"):
            theirs = optim.SGD(twin.network.parameters(), 0.05)
            for _ in range(2 if how == "learn again" else 1):  # the second time by weights that the first has moved
                self.sim.learn(self.optimizer)
                twin.learn(theirs)
            for own, other in zip(self.net.parameters(), twin.network.parameters(), strict=True):
                self.compare(own, other)
            self.current = False

    @rule(seed=st.integers(0, 3), record=st.booleans())
    def update(self, seed: int, record: bool) -> None:
        if not any(parameter.requires_grad for parameter in self.net.parameters()):
            return
        twin = self.twin()
        optimizer = optim.SGD(twin.network.parameters(), 0.05)
        trace = self.sim.update(self.given(seed), self.optimizer, record=record)
        expected = twin.update(self.given(seed), optimizer, record=record)
        self.compare(trace.free_energies, expected.free_energies)
        self.current = False
        for got, other in zip(self.net.parameters(), twin.network.parameters(), strict=True):
            self.compare(got, other)

    @rule(seed=st.integers(0, 3), given=st.sampled_from(("x", "y", "xy")))
    def predict(self, seed: int, given: str) -> None:
        clamps = {name: value for name, value in self.given(seed).items() if name in given}
        before = {name: node.value for name, node in self.net.nodes.items()} if self.current else {}
        found = self.sim.predict(clamps)
        for name, value in self.twin().predict(clamps).items():
            self.compare(found[name], value)
        for name, value in before.items():
            assert torch.equal(self.net[name].value, value), "what is shown is the last inference"

    @precondition(lambda self: not self.learning.backprop)
    @rule(seed=st.integers(0, 3), updating=st.booleans())
    def fail(self, seed: int, updating: bool) -> None:
        clamps = self.given(seed)
        clamps["y"] = torch.full_like(clamps["y"], 1e200)
        before = [parameter.detach().clone() for parameter in self.net.parameters()]
        shown = {name: node.value for name, node in self.net.nodes.items()} if self.current else {}
        learns = self.current and not self.learning.every_step
        gradients = self.sim.gradients() if learns else {}
        updating &= any(parameter.requires_grad for parameter in self.net.parameters())
        with pytest.raises(pcsim.errors.DivergenceError):
            self.sim.update(clamps, self.optimizer) if updating else self.sim.infer(clamps)
        assert all(map(torch.equal, self.net.parameters(), before))
        for name, value in shown.items():
            assert torch.equal(self.net[name].value, value)
        for parameter, gradient in (self.sim.gradients() if learns else {}).items():
            self.compare(gradient, gradients[parameter])

    @precondition(lambda self: self.current)
    @rule(name=st.sampled_from(("h1", "h2", "sum", "y")))
    def keep(self, name: str) -> None:
        node = self.net[name]
        for tensor in (node.value, node.prediction, node.error, node.forward_value):
            self.kept.append((tensor, tensor.clone()))

    @invariant()
    def kept_tensors_stay(self) -> None:
        assert all(torch.equal(tensor, before) for tensor, before in getattr(self, "kept", ()))

    def change(self, change: Callable[[], object]) -> None:
        """One change at a time, and three runs after it: programs take turns, and each has to notice."""
        change()
        twin, given = self.twin(), self.given(self.seed)
        twin.infer(given)
        for _ in range(3):
            self.sim.infer(given)
            for name, node in twin.network.nodes.items():
                self.compare(self.net[name].value, node.value)
        self.current = True

    @rule(value=st.sampled_from((0.5, 1.0, 2.0)), what=st.sampled_from(("energy_weight", "own_precision", "gain")))
    def set_number(self, what: str, value: float) -> None:
        part = self.net.edges["h1->h2"] if what == "gain" else self.net["h2"]
        self.change(lambda: setattr(part, what, value))

    @rule(relaxation=st.sampled_from(RELAXATIONS))
    def set_relaxation(self, relaxation: pcsim.Relaxation) -> None:
        self.change(lambda: setattr(self.sim, "relaxation", relaxation))

    @rule(learning=st.sampled_from(LEARNING), nudging=st.sampled_from(NUDGES))
    def set_rule_or_nudging(self, learning: pcsim.LearningRule, nudging: pcsim.Nudge | None) -> None:
        if nudging is None or not (nudging.centred and self.learning.every_step):
            self.change(lambda: setattr(self.sim, "nudging", nudging))
        if self.sim.nudging is None or not (self.sim.nudging.centred and learning.every_step):
            self.change(lambda: setattr(self.sim, "rule", learning))

    @rule(energy=st.sampled_from((pcsim.Gaussian, pcsim.StudentT)))
    def set_energy(self, energy: type[pcsim.Energy]) -> None:
        self.change(lambda: setattr(self.net["h2"], "energy_function", energy()))

    @rule(transfer=st.sampled_from((nn.Tanh, nn.SiLU, nn.Mish, nn.Identity)))
    def set_transfer(self, transfer: type[nn.Module]) -> None:
        self.change(lambda: setattr(self.net["h2"], "transfer", transfer()))

    @rule(kind=st.sampled_from(("linear", "unknown")), name=st.sampled_from(INNER))
    def replace_module(self, kind: str, name: str) -> None:
        linear = nn.Linear(4, 4, dtype=torch.float64)
        module = linear if kind == "linear" else nn.Sequential(nn.Mish(), linear)
        self.change(lambda: setattr(self.net.edges[name], "module", module))
        self.optimizer = optim.SGD(self.net.parameters(), 0.05)

    @rule(name=st.sampled_from(INNER), learns=st.booleans(), bias=st.booleans())
    def freeze(self, name: str, learns: bool, bias: bool) -> None:
        parameters = [p for p in self.net.edges[name].module.parameters() if not bias or p.dim() == 1]
        for parameter in parameters:
            parameter.requires_grad_(learns)

    @rule(name=st.sampled_from(INNER), how=st.sampled_from(("in place", "data", "storage")))
    def edit(self, name: str, how: str) -> None:
        parameter = next(self.net.edges[name].module.parameters())

        def in_place() -> None:
            with torch.no_grad():
                parameter.mul_(0.9)

        def in_data() -> None:
            parameter.data += 0.01

        def in_storage() -> None:
            parameter.data = parameter.data.clone() * 0.9

        self.change({"in place": in_place, "data": in_data, "storage": in_storage}[how])

    @rule(name=st.sampled_from(INNER), remove=st.booleans())
    def hook(self, name: str, remove: bool) -> None:
        module = self.net.edges[name].module
        if remove and module._forward_hooks:
            self.change(module._forward_hooks.clear)
        elif not module._forward_hooks:
            self.change(lambda: module.register_forward_hook(_halve))

    @rule(size=st.sampled_from((2, 3)))
    def another_batch_size(self, size: int) -> None:
        self.batch, self.current = size, False

    @rule()
    def move(self) -> None:
        self.net.float().double()
        self.current = False

    @precondition(lambda self: not any(edge.module._forward_hooks for edge in self.net.edges.values()))
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            pcsim.save_network(self.net, Path(folder) / "net.pcsim")
            loaded = pcsim.load_network(Path(folder) / "net.pcsim")
        for one, other in zip(self.net.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(one, other)
            assert one.requires_grad == other.requires_grad


def _halve(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 0.5 * output


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=22,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
