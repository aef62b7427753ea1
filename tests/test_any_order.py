"""A network driven through anything that users do, in any order; oracle: a fresh twin, run by the reference engine."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn, optim

import pcsim

LEARNING = (pcsim.SettledUpdate(), pcsim.ForwardUpdate(), pcsim.IncrementalUpdate(), pcsim.Backprop())
INNER = ("h1->h2", "h2->h3")


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

    @initialize(learning=st.sampled_from(LEARNING), alpha=st.sampled_from((None, 0.0, 0.1)))
    def start(self, learning: pcsim.LearningRule, alpha: float | None) -> None:
        self.net, self.batch, self.kept = build(), 3, []
        precision = pcsim.Constant() if alpha is None else pcsim.Spiking(alpha)
        self.relaxation, self.learning = pcsim.Relaxation(6, 0.2, precision=precision), learning
        self.sim = pcsim.Simulator(self.net, self.relaxation, learning)
        self.optimizer = optim.SGD(self.net.parameters(), 0.05)
        self.current = False

    def given(self, seed: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        sizes = (("x", 4), ("y", 3))
        return {name: torch.randn(self.batch, size, generator=draw, dtype=torch.float64) for name, size in sizes}

    def compare(self, got: Tensor | None, expected: Tensor | None) -> None:
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)

    def twin(self) -> pcsim.Simulator:
        return pcsim.Simulator(copy.deepcopy(self.net), self.relaxation, self.learning, engine="reference")

    @rule(seed=st.integers(0, 3), record=st.booleans())
    def run(self, seed: int, record: bool) -> None:
        twin = self.twin()
        trace, expected = (each.infer(self.given(seed), record=record) for each in (self.sim, twin))
        if record:
            self.compare(trace.energies, expected.energies)
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
    @rule(how=st.sampled_from(("gradients", "compute", "learn", "twice")))
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
        if how == "learn":
            self.sim.learn(self.optimizer)
            self.current = False

    @rule(seed=st.integers(0, 3))
    def update(self, seed: int) -> None:
        if not any(parameter.requires_grad for parameter in self.net.parameters()):
            return
        twin = self.twin()
        optimizer = optim.SGD(twin.network.parameters(), 0.05)
        self.sim.update(self.given(seed), self.optimizer)
        twin.update(self.given(seed), optimizer)
        self.current = False
        for got, expected in zip(self.net.parameters(), twin.network.parameters(), strict=True):
            self.compare(got, expected)

    @rule(seed=st.integers(0, 3))
    def predict(self, seed: int) -> None:
        given = {"x": self.given(seed)["x"]}
        for name, value in self.twin().predict(given).items():
            self.compare(self.sim.predict(given)[name], value)

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
        change()
        self.current = False

    @rule(value=st.sampled_from((0.5, 1.0, 2.0)), what=st.sampled_from(("energy_weight", "own_precision", "gain")))
    def set_number(self, what: str, value: float) -> None:
        part = self.net.edges["h1->h2"] if what == "gain" else self.net["h2"]
        self.change(lambda: setattr(part, what, value))

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
        if how == "in place":
            with torch.no_grad():
                parameter.mul_(0.9)
        elif how == "data":
            parameter.data += 0.01
        else:
            parameter.data = parameter.data.clone() * 0.9
        self.current = False

    @rule(name=st.sampled_from(INNER), remove=st.booleans())
    def hook(self, name: str, remove: bool) -> None:
        module = self.net.edges[name].module
        if remove:
            module._forward_hooks.clear()
        elif not module._forward_hooks:
            module.register_forward_hook(_halve)
        self.current = False

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
    max_examples=40,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
