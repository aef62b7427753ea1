"""The checks of pcsim.verify fail when they should, refuse what they cannot judge, and take a user's own parts."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from conftest import Noisy, generators
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pcsim
from pcsim import verify
from pcsim.engine.reference import ReferenceEngine
from pcsim.errors import SettingError
from pcsim.verify.comparing import compare


def chain() -> verify.Case:
    """A chain of tanh nodes with both ends clamped."""
    torch.manual_seed(0)
    net = pcsim.Network()
    for index, width in enumerate((3, 4, 4, 2)):
        net.add_node(f"n{index}", (width,), transfer=nn.Tanh() if index in (1, 2) else None)
        if index:
            net.add_edge(f"n{index - 1}", f"n{index}", nn.Linear(net[f"n{index - 1}"].shape[0], width))
    net.double()
    clamps: verify.NamedClamps = {"n0": torch.randn(2, 3).double(), "n3": torch.randn(2, 2).double()}
    return verify.Case(net, clamps, pcsim.Relaxation(3, 0.2))


class Halved(pcsim.Gaussian):
    """A Gaussian whose derivative is wrong."""

    def value_gradient(self, value: Tensor, prediction: Tensor, scale: float | Tensor) -> Tensor:
        return 0.5 * scale * (value - prediction)


class Forgetful(ReferenceEngine):
    """Learns nothing at all."""

    def gradients(self, state: Any) -> Any:
        return {}


class Telepathic(ReferenceEngine):
    """Lets one node feel a distant one."""

    def relax(self, problem: Any, batch: Any, learn: Any = None) -> Any:
        state = super().relax(problem, batch, learn)
        if problem.relaxation.steps:
            state.value["n1"] = state.value["n1"] + 0.1 * state.value["n3"].mean()
        return state


class Sentimental(ReferenceEngine):
    """Lets one node feel where it started."""

    def relax(self, problem: Any, batch: Any, learn: Any = None) -> Any:
        state = super().relax(problem, batch, learn)
        state.value["n1"] = state.value["n1"] + 0.1 * problem.relaxation.steps * state.forward_value["n1"]
        return state


class Climbing(ReferenceEngine):
    """Ascends the energy."""

    def relax(self, problem: Any, batch: Any, learn: Any = None) -> Any:
        state = super().relax(problem, batch, learn)
        for name in problem.clamping.free if problem.relaxation.steps else ():
            state.value[name] = 2 * state.forward_value[name] - state.value[name]
        return state


def test_a_wrong_derivative_is_caught_with_code_that_rebuilds_the_network() -> None:
    case = chain()
    case.network["n2"].energy_function = Halved()
    with pytest.raises(AssertionError, match=r"(?s)node 'n2', step 1: −∂F_t/∂v.*expected.*net\.add_node\('n2'"):
        verify.check_gradients(case.network, case.clamps, case.relaxation, engine="reference")


def test_missing_gradients_are_caught() -> None:
    case = chain()
    with pytest.raises(AssertionError, match=r"parameter 'edges\.n0->n1\.module\.weight' \(its grad is None\)"):
        verify.check_gradients(case.network, case.clamps, case.relaxation, engine=Forgetful)
    with pytest.raises(AssertionError, match=r"gradient of 'edges\.n0->n1\.module\.weight' is None, expected a tensor"):
        verify.check_engines_agree(case, ("reference", Forgetful))


def test_an_update_that_is_not_local_is_caught() -> None:
    case = chain()
    with pytest.raises(AssertionError, match=r"node 'n1': its value after one step, with \['n3'\]"):
        verify.check_locality(case.network, case.clamps, pcsim.Relaxation(0, 0.2), engine=Telepathic)
    with pytest.raises(AssertionError, match="node 'n1': its value after step 1, restarted from the state before it"):
        verify.check_locality(case.network, case.clamps, pcsim.Relaxation(2, 0.2), engine=Sentimental)


def test_a_step_that_climbs_is_caught() -> None:
    case = chain()
    with pytest.raises(AssertionError, match="F_t rose"):
        verify.check_descent(case.network, case.clamps, pcsim.Relaxation(1, 0.2), engine=Climbing)


def test_engines_that_differ_are_caught() -> None:
    with pytest.raises(AssertionError, match=r"Climbing.* against reference: run 1"):
        verify.check_engines_agree(chain(), ("reference", Climbing))


@pytest.mark.parametrize("broken", [False, True])
def test_checks_leave_everything_as_it_was(broken: bool) -> None:
    torch.manual_seed(0)
    net = pcsim.Network()
    for index in range(4):
        transfer = nn.Sequential(nn.Dropout(0.2), nn.BatchNorm1d(4).eval()) if index == 1 else None
        net.add_node(f"n{index}", (4,), transfer=transfer, energy=Halved() if broken and index == 2 else None)
    net.add_edge("n0", "n1", nn.Linear(4, 4))
    net.add_edge("n1", "n2", Noisy(4))
    net.add_edge("n2", "n3", nn.Linear(4, 4))
    clamps = {name: torch.randn(2, 4).double() for name in ("n0", "n3")}
    case = verify.Case(net.double(), clamps)
    for parameter in case.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    module = Doubling() if broken else nn.Linear(4, 3)
    relaxation, still = pcsim.Relaxation(1, 0.1), pcsim.Relaxation(0, 0.1)
    state, modes = generators(), [module.training for module in case.network.modules()]
    before = {name: tensor.clone() for name, tensor in case.network.state_dict().items()}
    gradients = [parameter.grad for parameter in case.network.parameters()]
    wrong = Climbing if broken else "batched"
    checks: list[Any] = [
        lambda: verify.check_gradients(case.network, case.clamps, relaxation, engine=wrong),
        lambda: verify.check_locality(case.network, case.clamps, still, engine=Telepathic if broken else "batched"),
        lambda: verify.check_descent(case.network, case.clamps, relaxation, engine=wrong),
        lambda: verify.check_engines_agree(attrs.evolve(case, relaxation=relaxation), ("reference", wrong)),
        lambda: verify.check_kernel(module, (4,)),
    ]
    for check in checks:
        with pytest.raises(AssertionError) if broken else contextlib.nullcontext():
            check()
        assert generators() == state
    assert [module.training for module in case.network.modules()] == modes
    for parameter, gradient in zip(case.network.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert bool((gradient == 1).all())
    for name, tensor in case.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_no_check_can_judge_is_refused() -> None:
    case, momentum = chain(), pcsim.Relaxation(3, 0.2, momentum=0.5)
    with pytest.raises(SettingError, match=r"momentum 0\.5"):
        verify.check_descent(case.network, case.clamps, momentum)
    with pytest.raises(SettingError, match=r"momentum 0\.5"):
        verify.check_locality(case.network, case.clamps, momentum)
    with pytest.raises(SettingError, match="IncrementalUpdate changes the weights"):
        verify.check_descent(case.network, case.clamps, case.relaxation, pcsim.IncrementalUpdate())
    with pytest.raises(SettingError, match="nothing is clamped"):
        verify.check_gradients(case.network, {})
    own = type("Own", (pcsim.LearningRule,), {})()
    with pytest.raises(SettingError, match="no objective of Own"):
        verify.check_gradients(case.network, case.clamps, case.relaxation, own)
    case.network["n1"].energy_weight = 5.0
    with pytest.raises(SettingError, match="node 'n1' has weight 1/rate"):
        verify.check_descent(case.network, case.clamps, case.relaxation)


def test_descent_counts_free_units() -> None:
    net = pcsim.topologies.mlp([2, 300, 2])
    with pytest.raises(SettingError, match="600 free units, and a Hessian is computed for 400 at most"):
        verify.check_descent(net, {"input": torch.zeros(2, 2), "output": torch.zeros(2, 2)})


def test_own_nodes_and_edges_are_drawn() -> None:
    def nodes(shape: tuple[int, ...]) -> st.SearchStrategy[dict[str, Any]]:
        return st.just({"transfer": nn.Softplus()})

    def edges(source: tuple[int, ...], contribution: tuple[int, ...]) -> st.SearchStrategy[nn.Module]:
        linear = st.builds(nn.Linear, st.just(math.prod(source)), st.just(math.prod(contribution)))
        return linear.map(lambda module: nn.Sequential(nn.Flatten(), module, nn.Unflatten(1, contribution)))

    drawn = verify.networks(nodes=(3, 3), node_factory=nodes, edge_factory=edges, cross_entropy=False)
    net = find(drawn, lambda network: len(network.edges) >= 2)
    assert all(type(node.transfer) is nn.Softplus for node in net.nodes.values())
    assert all(type(edge.module[0]) is nn.Flatten for edge in net.edges.values())
    case = verify.Case(net, {"n0": torch.zeros(1, *net["n0"].shape).double()})
    verify.check_gradients(case.network, case.clamps, pcsim.Relaxation(2, 0.1))


def test_networks_cover_what_can_be_built() -> None:
    kinds = {
        "cycle": lambda net: any(len(group) > 1 for group in net.components()),
        "self-loop": lambda net: any(e.source_name == e.target_name for e in net.edges.values()),
        "parallel edges": lambda net: any(name.endswith("#2") for name in net.edges),
        "deterministic": lambda net: any(node.deterministic for node in net.nodes.values()),
        "three axes": lambda net: any(len(node.shape) == 3 and node.incoming for node in net.nodes.values()),
        "convolution": lambda net: any(isinstance(module, nn.Conv2d) for module in net.modules()),
        "product": lambda net: any(isinstance(module, pcsim.Product) for module in net.modules()),
        "concatenation": lambda net: any(isinstance(module, pcsim.Concatenate) for module in net.modules()),
        "cross-entropy": lambda net: any(
            isinstance(node.energy_function, pcsim.CrossEntropy) for node in net.nodes.values()
        ),
        "learned precision": lambda net: any(node.log_precision is not None for node in net.nodes.values()),
        "learned prior": lambda net: any(isinstance(node.prior, nn.Parameter) for node in net.nodes.values()),
        "shared module": lambda net: len({id(e.module) for e in net.edges.values()}) < len(net.edges),
        "several roots": lambda net: len(net.roots()) > 1,
    }
    missing = set(kinds)

    @settings(max_examples=200, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(verify.networks())
    def draw(net: pcsim.Network) -> None:
        missing.difference_update([kind for kind in missing if kinds[kind](net)])

    draw()
    assert not missing


# Every comparison: a fault that only it can see


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures are told without a search for smaller networks."""
    monkeypatch.setattr("pcsim.verify.shrinking.MOST_TRIES", 0)


class Faulty(ReferenceEngine):
    """Right but for one thing.

    Args:
        network: to run.
        fault: what is wrong.
    """

    def __init__(self, network: pcsim.Network, fault: str) -> None:
        super().__init__(network)
        self.fault, self.relaxed, self.learned = fault, 0, 0
        self.kept: dict[str, Tensor] = {}

    def relax(self, task: Any, batch: Any, learn: Any = None) -> Any:
        self.relaxed += 1
        late, steps = self.fault == "second step", 0

        def learn_wrongly(gradients: Any) -> None:
            nonlocal steps
            steps += 1
            learn({p: 1.01 * g if steps == 2 else g for p, g in gradients.items()})

        try:
            state = super().relax(task, batch, learn_wrongly if late and learn else learn)
        except pcsim.errors.DivergenceError:
            if self.fault == "other refusal":
                raise SettingError("not that") from None
            if self.fault != "no refusal":
                raise
            return super().relax(attrs.evolve(task, relaxation=pcsim.Relaxation(0)), batch)
        if self.fault == "refusal" and self.relaxed == 2:
            raise SettingError("not again")
        if self.fault in ("value", "forward_value", "forward_prediction", "displacement", "multiplier"):
            tensors = getattr(state, self.fault)
            self.kept = {**tensors}
            setattr(state, self.fault, {**tensors, "n1": tensors["n1"] + 1e-6})
        if (self.fault == "second run" and self.relaxed == 2) or self.fault == f"{task.relaxation.steps} steps":
            state.value = {**state.value, "n1": state.value["n1"] + 1e-6}
        if self.fault == "weights elsewhere" and state.steps:
            distant = task.network.edges["n2->n3"].module.weight.detach().sum()
            state.value = {**state.value, "n1": state.value["n1"] + 1e-3 * distant}
        if self.fault == "steps":
            state.steps += 1
        if self.fault == "energies" and task.record:
            state.energies = state.energies + 1e-6
        if self.fault == "free energies" and task.record:
            state.free_energies = state.free_energies + 1e-6
        return state

    def gradients(self, state: Any) -> Any:
        self.learned += 1
        if self.fault == "multiplier":
            state.multiplier = self.kept
        found = dict(super().gradients(state))
        network, parameters = state.task.network, list(state.task.network.parameters())
        if self.fault == type(state.task.rule).__name__ or (self.fault == "second update" and self.learned % 2 == 0):
            found = {parameter: 1.01 * gradient for parameter, gradient in found.items()}
        if self.fault == "log_precision":
            found[network["n2"].log_precision] = found[network["n2"].log_precision] + 1e-3
        if self.fault == "missing":
            found.pop(parameters[0])
        if self.fault == "extra":
            found = {parameter: torch.zeros_like(parameter) for parameter in parameters} | found
        if self.fault == "parameter" and self.learned == 4:
            with torch.no_grad():
                parameters[0].add_(1e-6)
        return found

    def update_statistics(self, state: Any) -> None:
        if self.fault != "statistics":
            super().update_statistics(state)


ORDINARY = pcsim.Relaxation(3, 0.2)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("fault", "relaxation", "message"),
    [
        ("value", ORDINARY, "run 1: value of node 'n1'"),
        ("forward_value", ORDINARY, "run 1: forward value of node 'n1'"),
        ("forward_prediction", pcsim.Relaxation(3, 0.2, momentum=0.5), "run 1: forward prediction of node 'n1'"),
        ("displacement", ORDINARY, "run 1: energy of node 'n1'"),
        ("multiplier", pcsim.Relaxation(3, 0.2, multipliers=0.1), "run 1: message of edge 'n0->n1'"),
        ("steps", ORDINARY, "run 1: steps"),
        ("energies", ORDINARY, "run 2: energies"),
        ("free energies", ORDINARY, "run 2: F_t"),
        ("second run", ORDINARY, "run 2: value of node 'n1'"),
        ("SettledUpdate", ORDINARY, "run 1, update 0: gradient of"),
        ("second update", ORDINARY, "run 1, update 1: gradient of"),
        ("missing", ORDINARY, "is None, expected a tensor"),
        ("extra", pcsim.Relaxation(0), "is a tensor, expected None"),
        ("statistics", ORDINARY, "run 1: buffer"),
        ("parameter", ORDINARY, "parameter '"),
        ("refusal", ORDINARY, "run 2: .* is missing"),
        ("no refusal", pcsim.Relaxation(60, 1e100), "ended with no error, expected DivergenceError"),
        ("other refusal", pcsim.Relaxation(60, 1e100), "ended with SettingError, expected DivergenceError"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_every_difference_between_engines_is_told(fault: str, relaxation: pcsim.Relaxation, message: str) -> None:
    case = attrs.evolve(chain(), relaxation=relaxation)
    if fault == "statistics":
        case.network["n1"].transfer = nn.BatchNorm1d(4).double()
    with pytest.raises(AssertionError, match=message):
        verify.check_engines_agree(case, ("reference", partial(Faulty, fault=fault)))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("fault", "rule", "message"),
    [
        ("1 steps", None, "step 0: −∂F_t/∂v"),
        ("2 steps", None, "step 1: −∂F_t/∂v"),
        ("SettledUpdate", None, "SettledUpdate: gradient of parameter"),
        ("ForwardUpdate", None, "ForwardUpdate: gradient of parameter"),
        ("second step", None, "IncrementalUpdate, step 1: gradient of parameter"),
        ("Backprop", pcsim.Backprop(), "Backprop: gradient of parameter"),
        ("ArrivalUpdate", pcsim.ArrivalUpdate(), "ArrivalUpdate: gradient of parameter"),
        ("log_precision", None, r"gradient of parameter 'nodes\.n2\.log_precision'"),
        ("missing", None, "its grad is None"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_every_gradient_that_is_wrong_is_told(fault: str, rule: pcsim.LearningRule | None, message: str) -> None:
    case = chain()
    if fault == "log_precision":
        case.network["n2"].own_precision = pcsim.LearnedPrecision(2.0)
        case.network.double()
    schedule = pcsim.Spiking.for_rate(0.2) if rule is not None and rule.at_arrival else pcsim.Constant(0.5)
    relaxation = pcsim.Relaxation(3, 0.2, precision=schedule)
    verify.check_gradients(case.network, case.clamps, relaxation, rule, engine=partial(Faulty, fault="nothing"))
    with pytest.raises(AssertionError, match=message):
        verify.check_gradients(case.network, case.clamps, relaxation, rule, engine=partial(Faulty, fault=fault))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("relaxation", "engine", "message"),
    [
        (pcsim.Relaxation(0, 0.2), partial(Faulty, fault="weights elsewhere"), "parameters beyond its edges changed"),
        (pcsim.Relaxation(2, 0.2, hold_predictions=True), Telepathic, "from the present and forward values about it"),
    ],
    ids=["parameters", "held"],
)
def test_every_way_of_reading_further_is_told(relaxation: pcsim.Relaxation, engine: Any, message: str) -> None:
    case = chain()
    verify.check_locality(case.network, case.clamps, relaxation, engine="reference")
    with pytest.raises(AssertionError, match=message):
        verify.check_locality(case.network, case.clamps, relaxation, engine=engine)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("fault", ["ArrivalUpdate", "missing"])
def test_every_gradient_that_is_not_backprop_s_is_told(fault: str) -> None:
    case = chain()
    with pytest.raises(AssertionError, match=r"ArrivalUpdate: gradient of 'edges\.n0->n1\.module\.weight'"):
        verify.check_backprop_agreement(case.network, case.clamps, engine=partial(Faulty, fault=fault))


def test_numbers_are_compared_by_shape_size_and_whether_they_are_numbers() -> None:
    case, nan = chain(), math.nan
    ones = torch.ones(2, 3)
    compare("same", torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0 + 1e-9]), 1e-6, 1.0, case)
    compare("large", torch.tensor([1e3]), torch.tensor([1e3 + 1e-4]), 1e-6, 1e3, case)
    for got, expected in ((ones[:1], ones), (ones, 1.01 * ones), (nan * ones, ones), (ones, nan * ones)):
        with pytest.raises(AssertionError, match=r"these, at|these: shape"):
            compare("these", got, expected, 1e-6, 1.0, case)


class Scaling(nn.Module):
    """By a factor and a shift that learn."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def forward(self, value: Tensor) -> Tensor:
        return self.factor * value + self.shift


class ScalingKernel(pcsim.Kernel[Scaling]):
    """Right but for one thing."""

    stacks, reads, fills_out, adds = True, "nothing", True, True
    fault = ""

    def _wrong(self, fault: str, result: Tensor) -> Tensor:
        return result.add_(1e-3) if self.fault == fault else result

    def _weights(self, call: Any, value: Tensor) -> tuple[Tensor, Tensor]:
        factor, shift = call.weights["factor"], call.weights["shift"]
        stacked = factor.dim() == 2 and self.fault != "stack"
        return (factor.unsqueeze(1), shift.unsqueeze(1)) if stacked else (factor, shift)

    def forward(self, call: Any, value: Tensor, out: Any = None) -> Tensor:
        factor, shift = self._weights(call, value)
        if self.fault == "stack" and factor.dim() == 2:
            factor, shift = factor[0], shift[0]
        given = torch.empty_like(value) if out is None else out
        fault = "prediction" if out is None else "prediction into a place"
        return self._wrong(fault, torch.add(factor * value, shift, out=given))

    def predicting(self, call: Any, value: Tensor, out: Tensor) -> Any:
        right = super().predicting(call, value, out)
        return lambda: self._wrong("written prediction", right())

    def message(self, call: Any, delta: Tensor, value: Tensor, output: Tensor, out: Any = None) -> Tensor:
        given = torch.empty_like(delta) if out is None else out
        fault = "message" if out is None else "message into a place"
        return self._wrong(fault, torch.mul(delta, self._weights(call, value)[0], out=given))

    def adding(self, call: Any, delta: Tensor, goal: Tensor, factor: float, *, over: bool = False) -> Any:
        def add() -> None:
            goal.mul_(0 if over and self.fault != "message over another" else 1)
            goal.add_(delta * self._weights(call, delta)[0], alpha=factor)
            self._wrong("added message", goal)

        return add

    def gradients(self, call: Any, delta: Tensor, value: Tensor, factor: float, out: Any) -> None:
        if "factor" in out:
            torch.sum(factor * delta * value, -2, out=out["factor"])
            self._wrong("gradient", out["factor"])
        if "shift" in out:
            torch.sum(factor * delta, -2, out=out["shift"])
            if "factor" not in out:
                self._wrong("gradient alone", out["shift"])


KERNEL_FAULTS = {
    "prediction": "prediction differs",
    "prediction into a place": "prediction differs",
    "written prediction": "written prediction differs",
    "message": "message differs",
    "message into a place": "message differs",
    "added message": "added message differs",
    "message over another": "message written over another differs",
    "gradient": "gradient of parameter 'factor' differs",
    "gradient alone": "gradient of parameter 'shift' differs",
    "stack": "prediction differs",
}


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_every_result_of_a_kernel_that_is_wrong_is_told(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pcsim.register_kernel(Scaling, ScalingKernel())
    verify.check_kernel(Scaling(), (3,))
    monkeypatch.setattr(ScalingKernel, "fault", fault)
    with pytest.raises(AssertionError, match=KERNEL_FAULTS[fault]):
        verify.check_kernel(Scaling(), (3,))


class Clipping(nn.Module):
    """To 1 at most."""

    def forward(self, value: Tensor) -> Tensor:
        return value.clamp(max=1.0)


class ClippingKernel(pcsim.Kernel[Clipping]):
    """Right, unless one of its results is written over what it is made of."""

    elementwise, reads = True, "output"
    fault = ""

    def _into(self, out: Any, given: Tensor, result: Tensor, fault: str) -> Tensor:
        if out is None:
            return result
        return out.copy_(result + 1e-3 if out is given and self.fault == fault else result)

    def forward(self, call: Any, value: Tensor, out: Any = None) -> Tensor:
        return self._into(out, value, value.clamp(max=1.0), "prediction")

    def message(self, call: Any, delta: Tensor, value: Tensor, output: Tensor, out: Any = None) -> Tensor:
        return self._into(out, delta, delta * (output < 1), "message")


@pytest.mark.parametrize("fault", ["message over the error itself", "prediction over its input"])
def test_a_kernel_that_is_wrong_in_place_is_told(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pcsim.register_kernel(Clipping, ClippingKernel())
    verify.check_kernel(Clipping(), (3,))
    monkeypatch.setattr(ClippingKernel, "fault", fault.partition(" ")[0])
    with pytest.raises(AssertionError, match=fault):
        verify.check_kernel(Clipping(), (3,))


# What a failure prints


class Remembering(nn.Module):
    """Adds what it has seen before: no function of its input alone."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.seen = factor, 0.0

    def forward(self, value: Tensor) -> Tensor:
        result = value + self.factor * self.seen
        self.seen = float(value.detach().mean()) + 1
        return result


class Doubling(nn.Module):
    """Has a kernel that is wrong where there are several units."""

    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


class WrongKernel(pcsim.Kernel[Doubling]):
    reads = "nothing"

    def forward(self, call: Any, value: Tensor, out: Any = None) -> Tensor:
        return 2 * value

    def message(self, call: Any, delta: Tensor, *others: Any) -> Tensor:
        return delta.flip(-1) * 2


pcsim.register_kernel(Doubling, WrongKernel())


def code_that_fails_again(message: str) -> str:
    """The code that a failure prints, after what it says."""
    return message[message.index("\nimport ") :]


def assert_fails_again(message: str, sizes: str) -> None:
    """The printed code, executed, fails; and as many parts as said are left."""
    assert f"The smallest found that fails, {sizes}" in message
    with pytest.raises(AssertionError) as again:
        exec(code_that_fails_again(message), {})
    if "engine" not in message:
        assert message.split(":\n")[1].splitlines()[0] == str(again.value).splitlines()[0]


def test_a_broken_energy_is_shown_by_the_smallest_network() -> None:
    case = chain()
    case.network["n2"].energy_function = Halved()
    with pytest.raises(AssertionError) as failure:
        verify.check_gradients(case.network, case.clamps, case.relaxation)
    message = str(failure.value)
    assert_fails_again(message, "3 of 4 nodes, 2 of 3 edges, 1 of 2 samples, 2 of 3 steps")
    assert "from test_verify import Halved" in message
    assert "energy=Halved()" in message
    assert isinstance(case.network["n2"].energy_function, Halved)
    assert len(case.network.nodes) == 4


def test_a_broken_edge_module_is_shown_by_the_smallest_network() -> None:
    net = chain().network
    net.add_edge("n1", "n2", Remembering(0.5), name="broken")
    with pytest.raises(AssertionError) as failure:
        verify.check_locality(net, {"n0": torch.ones(2, 3).double(), "n3": torch.ones(2, 2).double()})
    message = str(failure.value)
    assert "3 of 4 nodes, 1 of 4 edges, 1 of 2 samples" in message
    assert "net.add_edge('n1', 'n2', Remembering(factor=0.5), name='broken')" in message
    with pytest.raises(AssertionError, match="they differ by"):
        exec(code_that_fails_again(message), {})


def test_a_broken_kernel_is_shown_by_the_smallest_values() -> None:
    with pytest.raises(AssertionError) as failure:
        verify.check_kernel(Doubling(), (4, 3), batch=5)
    message = str(failure.value)
    assert "from test_verify import Doubling" in message
    assert message.endswith("pcsim.verify.check_kernel(Doubling(), (1, 3), batch=1)")
    with pytest.raises(AssertionError, match=r"Doubling\(\): message differs"):
        exec(code_that_fails_again(message), {})


@pytest.mark.parametrize("engine", [Climbing, partial(Climbing)], ids=["class", "partial"])
def test_a_broken_engine_is_shown_by_the_smallest_network(engine: Any) -> None:
    case = chain()
    with pytest.raises(AssertionError) as agreement:
        verify.check_engines_agree(case, ("reference", engine))
    assert_fails_again(str(agreement.value), "2 of 4 nodes, 1 of 3 edges, 1 of 2 samples, 1 of 3 steps")
    with pytest.raises(AssertionError) as descent:
        verify.check_descent(case.network, case.clamps, case.relaxation, engine=engine)
    assert_fails_again(str(descent.value), "2 of 4 nodes, 1 of 3 edges, 1 of 2 samples, 1 of 3 steps")


@pytest.mark.parametrize(
    "phases",
    [
        pytest.param((Phase.generate,), id="ours"),
        pytest.param((Phase.generate, Phase.shrink), id="hypothesis's", marks=pytest.mark.slow),
    ],
)
def test_a_failure_within_hypothesis_is_shown_by_the_smallest_network(phases: Any) -> None:
    shrinks = Phase.shrink in phases
    broken = verify.networks(
        nodes=(2, 2) if shrinks else (4, 6),
        priors=False,
        node_factory=lambda shape: {"energy": Halved()},
        edge_factory=lambda source, contribution: nn.Linear(1, 1),
        node_shapes=st.just((1,)),
    )

    @settings(max_examples=100, deadline=None, derandomize=True, database=None, phases=phases)
    @given(verify.cases(broken, rules=[pcsim.SettledUpdate()], momentum=False, targets=True, most_samples=1))
    def check(case: verify.Case) -> None:
        verify.check_gradients(case.network, case.clamps, case.relaxation)

    with pytest.raises(AssertionError) as failure:
        check()
    message = str(failure.value)
    assert ("The smallest found that fails" in message) == (not shrinks)
    assert message.count("net.add_node(") <= 3
    with pytest.raises(AssertionError, match="∂F_t/∂v"):
        exec(code_that_fails_again(message), {})


def test_nothing_is_left_out_of_what_fails_only_as_a_whole() -> None:
    case = chain()

    def whole(case: verify.Case) -> None:
        assert not (len(case.network.edges) == 3 and case.batch == 2 and case.relaxation.steps == 3)

    found = verify.smallest(case, whole)
    assert (len(found.network.nodes), found.batch, found.relaxation.steps) == (4, 2, 3)
    assert set(found.clamps) < set(case.clamps)
    assert set(case.clamps) == {"n0", "n3"}
    assert verify.smallest(found, whole) is found


def test_what_fails_for_another_reason_is_no_smaller_case() -> None:
    def check(case: verify.Case) -> None:
        if len(case.network.nodes) < 3:
            raise RuntimeError
        raise AssertionError("always")

    assert len(verify.smallest(chain(), check).network.nodes) == 3


# Code


class Opaque(nn.Module):
    """Tells nobody what it was made of."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = self.linear(value)
        return result


@attrs.frozen
class Halving(pcsim.PrecisionSchedule):
    """A schedule of a user's own."""

    factor: float = 0.5

    def at(self, step: int, level: int | None, steps: int) -> float:
        return self.factor**step


def rebuilt(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_weights_that_come_from_no_seed_are_written_where_they_are_few() -> None:
    case = chain()
    names = rebuilt(repr(case))
    for name, parameter in case.network.named_parameters():
        assert torch.equal(dict(names["net"].named_parameters())[name], parameter)
    trained = verify.SeededNetwork()
    trained.add_node("a", (2,))
    trained.add_edge("a", "a", nn.Linear(2, 2))
    trained.seed_weights(3)
    assert "net.seed_weights(3)" in verify.code_of(trained)
    with torch.no_grad():
        trained.edges["a->a"].module.weight.add_(1)
    again = rebuilt(verify.code_of(trained))["net"]
    assert torch.equal(again.edges["a->a"].module.weight, trained.edges["a->a"].module.weight)
    assert "none of them is written here" in verify.code_of(pcsim.topologies.mlp([30, 20]))


def test_settings_of_one_s_own_are_imported() -> None:
    case = chain()
    relaxation = pcsim.Relaxation(3, 0.1, precision=Halving(0.25), tolerance=1e-3)
    code = verify.code_of(case.network, case.clamps, relaxation, pcsim.ForwardUpdate())
    assert "from test_verify import Halving" in code
    assert rebuilt(code)["relaxation"] == relaxation
    assert rebuilt(code)["rule"] == pcsim.ForwardUpdate()


def test_what_cannot_be_written_is_said() -> None:
    class Local(nn.Identity):
        pass

    net = pcsim.Network()
    net.add_node("a", (100,), precision=torch.ones(100))
    net.add_edge("a", "a", Opaque(100))
    net.add_edge("a", "a", Local())
    code = verify.code_of(net, {"a": torch.ones(1, 100)})
    assert "# Opaque(...) stands for arguments that are not known" in code
    assert "net.add_edge('a', 'a', Opaque(...), name='a->a')" in code
    assert "# Local: put its definition here" in code
    assert "# tensors of more than 64 numbers are written as zeros" in code
    compile(code, "code", "exec")


# Factories


def test_factories_may_make_parts_or_leave_them_to_the_default() -> None:
    def nodes(shape: tuple[int, ...]) -> dict[str, Any] | None:
        return {"transfer": nn.Softplus()} if shape == (2,) else None

    def edges(source: tuple[int, ...], contribution: tuple[int, ...]) -> nn.Module | None:
        return nn.Sequential(nn.Linear(source[0], contribution[0]), nn.Sigmoid()) if source == (2,) else None

    drawn = verify.networks(
        node_factory=nodes, edge_factory=edges, node_shapes=st.sampled_from([(2,), (3,)]), cross_entropy=False
    )
    kinds = {(True, True), (True, False), (False, True), (False, False)}
    seen: set[tuple[bool, bool]] = set()

    @settings(max_examples=30, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(drawn)
    def draw(net: pcsim.Network) -> None:
        for node in net.nodes.values():
            assert node.shape in ((2,), (3,))
            assert (type(node.transfer) is nn.Softplus) == (node.shape == (2,))
        for edge in net.edges.values():
            own = isinstance(edge.module, nn.Sequential) and isinstance(edge.module[-1], nn.Sigmoid)
            assert own == (edge.source.shape == (2,))
            seen.add((edge.source.shape == (2,), edge.target.shape == (2,)))

    draw()
    assert seen == kinds


def test_values_of_one_s_own_are_clamped() -> None:
    def values(node: pcsim.Node, batch: int) -> Tensor | None:
        return torch.full((batch, *node.shape), 7.0).double() if node.name == "n0" else None

    clamped = []

    @settings(max_examples=20, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(verify.cases(verify.networks(nodes=(2, 4)), values=values, partial=False))
    def draw(case: verify.Case) -> None:
        for name, value in case.clamps.items():
            assert bool((value == 7).all()) == (name == "n0")
            clamped.append(name)

    draw()
    assert {"n0", "n1"} <= set(clamped)


def test_a_network_of_one_s_own_gets_other_weights() -> None:
    weights = []

    @settings(max_examples=5, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(verify.cases(verify.own_networks(lambda: pcsim.topologies.mlp([3, 4, 2])), momentum=False, most_steps=1))
    def draw(case: verify.Case) -> None:
        assert list(case.network.nodes) == ["input", "hidden1", "output"]
        weights.append(case.network.edges["input->hidden1"].module.weight[0, 0].item())
        verify.check_gradients(case.network, case.clamps, case.relaxation)

    draw()
    assert len(set(weights)) > 1


# The example

EXAMPLE = Path(__file__).parent.parent / "examples" / "verify_my_network.py"


@pytest.mark.slow
def test_the_example_passes_as_a_file_of_pytest() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(EXAMPLE), "-n", "0", "-q", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        cwd=EXAMPLE.parent.parent,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "6 passed" in run.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "test", "shown"),
    [
        (
            "return scale * self.scale * torch.tanh(",
            "return 0.5 * scale * self.scale * torch.tanh(",
            "test_the_local_rules_are_the_gradient_of_the_energy",
            "energy=LogCosh(",
        ),
        (
            "return self.content(value) * torch.sigmoid(self.gate(value))",
            "self.before = getattr(self, 'before', 0) + 1\n        return self.before * self.content(value)",
            "test_the_engines_agree",
            "Gated(inputs=",
        ),
        (
            'torch.mul(delta, call.weights["weight"], out=out)',
            'torch.mul(delta, 2 * call.weights["weight"], out=out)',
            "test_the_kernel_computes_what_autograd_does",
            "check_kernel(Scale(units=1), (1,), batch=1)",
        ),
        (
            'torch.mul((delta * value).sum(0), factor, out=out["weight"])',
            'torch.mul((delta * value).mean(0), factor, out=out["weight"])',
            "test_the_engines_agree",
            "Scale(units=",
        ),
    ],
    ids=["energy", "edge module", "kernel", "kernel in a network"],
)
def test_what_is_broken_in_the_example_is_found_and_printed_as_code_that_fails_again(
    right: str, wrong: str, test: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = EXAMPLE.read_text()
    assert source.count(right) == 1
    path = tmp_path / "verify_broken.py"
    path.write_text(source.replace(right, wrong))
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, path.stem, module)
    specification.loader.exec_module(module)
    with pytest.raises(AssertionError) as failure:
        getattr(module, test)()
    message = str(failure.value)
    code = message[message.index("\nimport ") :]
    assert "from verify_broken import " in code
    assert shown in code
    assert code.count("net.add_node(") <= 3
    with pytest.raises(AssertionError):
        exec(code, {})


class Spreading(nn.Module):
    """Takes values of one unit as well, which it spreads over all of its own."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, units))

    def forward(self, value: Tensor) -> Tensor:
        return self.scale * value


class SpreadingKernel(pcsim.Kernel[Spreading]):
    """Its message leaves out the scale."""

    def forward(self, call: Any, value: Tensor, out: Any = None) -> Tensor:
        return torch.mul(value, call.weights["scale"], out=out)

    def message(self, call: Any, delta: Tensor, *others: Any) -> Tensor:
        return delta.clone()

    def gradients(self, call: Any, delta: Tensor, value: Tensor, factor: float, out: Any) -> None:
        out["scale"].copy_(factor * (delta * value).sum(0))


def test_a_kernel_is_not_shrunk_to_values_that_its_module_spreads() -> None:
    pcsim.register_kernel(Spreading, SpreadingKernel())
    with pytest.raises(AssertionError, match=r"message differs from autograd's by") as failure:
        verify.check_kernel(Spreading(5), (5,))
    assert "(5,), batch=1" in str(failure.value)


@pytest.mark.parametrize(
    ("module", "kernel", "message"),
    [
        (
            Spreading,
            SpreadingKernel,
            "the class SpreadingKernel given, expected an instance of a Kernel; call the class",
        ),
        (Spreading(2), SpreadingKernel(), r"Spreading\(\) given, expected a type of modules"),
        (Spreading, "reads", "SpreadingKernel.reads: 'value' given, expected one of nothing, input, output"),
    ],
    ids=["class", "module", "reads"],
)
def test_what_is_no_kernel_is_refused(module: Any, kernel: Any, message: str) -> None:
    if kernel == "reads":
        kernel = SpreadingKernel()
        kernel.reads = "value"
    with pytest.raises(pcsim.errors.SettingError, match=message):
        pcsim.register_kernel(module, kernel)
