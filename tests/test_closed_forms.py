"""Closed forms (SPEC §10): what a linear solve, torch.optim, plain autograd or arithmetic by hand gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import attrs
import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from scipy import special, stats
from torch import Tensor, nn, optim
from torch.nn import functional

import pcsim
from pcsim.errors import PrecisionWarning, SettingError
from pcsim.graph.energy import Scale
from pcsim.topologies.mlp import mlp

Clamps = dict[str, Tensor | tuple[Tensor, Tensor]]

TOO_SHORT = "ignore:spiking precision never spikes:pcsim.errors.PrecisionWarning"
EULER = 0.36787944117144233  # e^-1


@pytest.fixture(params=["reference", "batched"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# Plain PyTorch, without pcsim: a chain of linear layers with an activation on all but the last.


def identity(value: Tensor) -> Tensor:
    return value


@attrs.frozen
class Plain:
    """A chain in plain PyTorch; values, scales and energies are indexed by layer, input first."""

    weights: list[Tensor]
    biases: list[Tensor]
    activation: Callable[[Tensor], Tensor]

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for pair in zip(self.weights, self.biases, strict=True) for parameter in pair]

    def predict(self, layer: int, value: Tensor) -> Tensor:
        linear = value @ self.weights[layer].T + self.biases[layer]
        return linear if layer == len(self.weights) - 1 else self.activation(linear)

    def forward(self, value: Tensor) -> list[Tensor]:
        values = [value]
        for layer in range(len(self.weights)):
            values.append(self.predict(layer, values[-1]))
        return values

    def energies(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [0.5 * (values[k + 1] - self.predict(k, values[k])).square().sum(1) for k in range(len(self.weights))]

    def total(self, values: Sequence[Tensor], scales: Sequence[float | Tensor]) -> Tensor:
        energies = self.energies(values)
        return sum((s * e.sum() for s, e in zip(scales, energies, strict=True)), torch.zeros((), dtype=torch.float64))


def chain(sizes: Sequence[int], activation: Callable[[], nn.Module], **latents: str) -> pcsim.Network:
    """The library's own chain, in float64 and with biases that are not zero."""
    net = mlp(sizes, activation=activation, **latents).double()  # type: ignore[arg-type]
    for linear in linears(net):
        nn.init.normal_(linear.bias, std=0.3)
    return net


def linears(net: pcsim.Network) -> list[nn.Linear]:
    return [module for module in net.modules() if isinstance(module, nn.Linear)]


def plain(net: pcsim.Network, activation: Callable[[Tensor], Tensor]) -> Plain:
    layers = linears(net)
    return Plain(
        [layer.weight.detach().clone().requires_grad_() for layer in layers],
        [layer.bias.detach().clone().requires_grad_() for layer in layers],
        activation,
    )


def names(net: pcsim.Network) -> list[str]:
    return list(net.nodes)


def read(net: pcsim.Network) -> list[Tensor]:
    return [node.value.clone() for node in net.nodes.values()]


def grads(net: pcsim.Network) -> list[Tensor]:
    """Gradients in the order of Plain.parameters; None counts as zero."""
    found = [parameter for linear in linears(net) for parameter in (linear.weight, linear.bias)]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in found]


def spiking(step: int, depth: int, alpha: float, peak: float) -> list[float]:
    """π of each layer's node at a step, first hidden layer first: the error reaches the node of level k at step k."""
    return [peak if step == depth - 1 - layer else alpha for layer in range(depth)]


# Linear Gaussian networks against a sparse linear solve


@attrs.frozen
class System:
    """F = ½ (A x − b)ᵀ D (A x − b) over all units x, by node names."""

    matrix: scipy.sparse.csr_array
    offset: np.ndarray
    scale: scipy.sparse.dia_array
    place: dict[str, slice]

    def solve(self, given: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The units that minimise F with the known ones given, and the eigenvalues of its Hessian in the others."""
        free = self.matrix[:, ~known]
        hessian = (free.T @ self.scale @ free).tocsc()
        right = free.T @ self.scale @ (self.offset - self.matrix[:, known] @ given[known])
        solution = given.copy()
        solution[~known] = scipy.sparse.linalg.spsolve(hessian, right)
        return solution, np.linalg.eigvalsh(hessian.toarray())


def assemble(net: pcsim.Network) -> System:
    """From the weights, biases, gains, priors, precisions and node weights alone; pcsim computes nothing."""
    place: dict[str, slice] = {}
    units = 0
    for name, node in net.nodes.items():
        place[name] = slice(units, units + node.shape[0])
        units += node.shape[0]
    matrix = scipy.sparse.lil_array((units, units))
    offset, scale = np.zeros(units), np.zeros(units)
    for name, node in net.nodes.items():
        if node.incoming or node.prior is not None:
            matrix[place[name], place[name]] = np.eye(node.shape[0])
            scale[place[name]] = node.energy_weight * np.broadcast_to(np.asarray(node.own_precision), node.shape)
        if node.prior is not None:
            offset[place[name]] = node.prior.numpy()
    for edge in net.edges.values():
        rows, columns = place[edge.target_name], place[edge.source_name]
        if isinstance(edge.module, nn.Linear):
            weight = edge.module.weight.detach().numpy()
            if edge.module.bias is not None:
                offset[rows] += edge.gain * edge.module.bias.detach().numpy()
        else:
            assert isinstance(edge.module, nn.Identity)
            weight = np.eye(rows.stop - rows.start)
        matrix[rows, columns] = matrix[rows, columns].toarray() - edge.gain * weight
    return System(matrix.tocsr(), offset, scipy.sparse.diags_array(scale), place)


def solved(net: pcsim.Network, clamps: Clamps) -> tuple[dict[str, Tensor], float, float]:
    """Solution by node name, and the smallest and largest curvature over the batch."""
    system = assemble(net)
    batch = len(next(value[0] if isinstance(value, tuple) else value for value in clamps.values()))
    units = system.matrix.shape[1]
    solution = np.zeros((batch, units))
    curvatures = []
    for sample in range(batch):
        given, known = np.zeros(units), np.zeros(units, dtype=bool)
        for name, clamp in clamps.items():
            value, mask = clamp if isinstance(clamp, tuple) else (clamp, torch.ones_like(clamp, dtype=torch.bool))
            given[system.place[name]] = value[sample].numpy()
            known[system.place[name]] = mask.expand(value.shape)[sample].numpy()
        solution[sample], eigenvalues = system.solve(given, known)
        curvatures += [eigenvalues[0], eigenvalues[-1]]
    values = {name: torch.from_numpy(solution[:, place].copy()) for name, place in system.place.items()}
    return values, float(min(curvatures)), float(max(curvatures))


def heavy_ball(least: float, most: float) -> pcsim.Relaxation:
    """The fastest gradient descent with momentum on a quadratic of these curvatures, run to rounding error."""
    low, high = math.sqrt(least), math.sqrt(most)
    steps = 60 + int(40 * high / low)
    assert steps < 3000, "choose a better conditioned example"
    return pcsim.Relaxation(steps, 4 / (low + high) ** 2, momentum=((high - low) / (high + low)) ** 2)


def add(net: pcsim.Network, source: str, target: str, gain: float = 1.0, bias: bool = True) -> None:
    linear = nn.Linear(net[source].shape[0], net[target].shape[0], bias=bias)
    net.add_edge(source, target, linear, gain=gain)


def linear_chain() -> tuple[pcsim.Network, Clamps]:
    net = pcsim.Network()
    for name, size in (("x", 3), ("a", 5), ("b", 4), ("y", 2)):
        net.add_node(name, (size,))
    for source, target in (("x", "a"), ("a", "b"), ("b", "y")):
        add(net, source, target)
    return net, {"x": draw(3, 3), "y": draw(3, 2)}


def linear_skip() -> tuple[pcsim.Network, Clamps]:
    """Skips, a parallel edge, an identity, gains, weights and precisions."""
    net = pcsim.Network()
    net.add_node("x", (3,))
    net.add_node("a", (4,), energy_weight=1.7)
    net.add_node("b", (4,), precision=torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64))
    net.add_node("c", (4,), precision=0.6, energy_weight=2.0)
    net.add_node("y", (3,), precision=torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64), energy_weight=0.5)
    add(net, "x", "a")
    add(net, "a", "b", gain=-1.3)
    net.add_edge("a", "c", gain=0.7)
    add(net, "b", "c")
    add(net, "b", "c", gain=0.4, bias=False)
    add(net, "c", "y", gain=2.0)
    add(net, "x", "y")
    return net, {"x": draw(2, 3), "y": draw(2, 3)}


def linear_cycle() -> tuple[pcsim.Network, Clamps]:
    """A cycle of two nodes, a self-loop, and an edge back from the target."""
    net = pcsim.Network()
    for name, size in (("x", 2), ("a", 3), ("b", 4), ("y", 2)):
        net.add_node(name, (size,))
    add(net, "x", "a")
    add(net, "a", "b")
    add(net, "b", "a", gain=0.5)
    add(net, "a", "a", gain=-0.3)
    add(net, "b", "y")
    add(net, "y", "a")
    return net, {"x": draw(3, 2), "y": draw(3, 2)}


def linear_partial() -> tuple[pcsim.Network, Clamps]:
    """Of some nodes only some units are given, in one the same for all samples and in one not."""
    net, clamps = linear_chain()
    hidden = torch.tensor([True, False, False, True, False])
    output = torch.tensor([[True, False], [False, True], [True, True]])
    return net, clamps | {"a": (draw(3, 5), hidden), "y": (draw(3, 2), output)}


def linear_prior() -> tuple[pcsim.Network, Clamps]:
    """Free roots with priors, of which one is weighed unit by unit, and one free root without."""
    net = pcsim.Network()
    precision = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    net.add_node("p", (3,), prior=torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), precision=precision)
    net.add_node("q", (2,), prior=0.7, energy_weight=0.8)
    net.add_node("r", (2,))
    net.add_node("h", (4,))
    net.add_node("y", (5,))
    add(net, "p", "h")
    add(net, "q", "h", gain=1.5)
    add(net, "r", "y", gain=2.0)
    add(net, "h", "y")
    return net, {"y": draw(2, 5)}


@pytest.mark.parametrize("build", [linear_chain, linear_skip, linear_cycle, linear_partial, linear_prior])
def test_a_linear_network_relaxes_to_its_linear_solution(
    engine: str, build: Callable[[], tuple[pcsim.Network, Clamps]]
) -> None:
    net, clamps = build()
    net.double()
    expected, least, most = solved(net, clamps)
    pcsim.Simulator(net, heavy_ball(least, most), engine=engine).infer(clamps)
    for name, node in net.nodes.items():
        assert_close(node.value, expected[name], 1e-10)
    moved = [(node.value - node.forward_value).abs().max() for name, node in net.nodes.items() if name not in clamps]
    assert min(moved) > 1e-3


def test_predict_relaxes_where_a_forward_pass_is_not_exact(engine: str) -> None:
    net = pcsim.Network()
    for name, size in (("label", 2), ("hidden", 3), ("input", 5)):
        net.add_node(name, (size,))
    add(net, "label", "hidden")
    add(net, "hidden", "input")
    net.double()
    clamps: Clamps = {"input": draw(4, 5)}
    expected, least, most = solved(net, clamps)
    # The schedule is for learning: nothing arrives from a target here, so that predicting weighs all errors alike.
    relaxation = attrs.evolve(heavy_ball(least, most), precision=pcsim.Spiking(alpha=0.0))
    simulator = pcsim.Simulator(net, relaxation, engine=engine)
    simulator.infer({"label": draw(4, 2), "input": draw(4, 5)})
    shown = read(net)
    predicted = simulator.predict(clamps)
    assert_close(predicted["label"], expected["label"], 1e-10)
    assert_close(predicted["hidden"], expected["hidden"], 1e-10)
    assert float(predicted["label"].abs().min()) > 1e-6
    for before, after in zip(shown, read(net), strict=True):
        assert torch.equal(before, after)


def test_what_is_predicted_asks_for_no_gradient(engine: str) -> None:
    """Whatever the clamps and modules ask for: by a forward pass, and by a relaxation, of a cycle too."""
    net = pcsim.Network()
    net.add_node("given", (3,))
    net.add_node("cause", (3,), prior=nn.Parameter(torch.zeros(3)))
    net.add_node("sum", (3,), deterministic=True)
    net.add_node("hidden", (3,), transfer=nn.PReLU())
    net.add_node("image", (3,), precision=pcsim.LearnedPrecision())
    net.add_edge("given", "sum", nn.Linear(3, 3))
    net.add_edge("cause", "sum", nn.Sequential(nn.Linear(3, 3), nn.Softplus()))
    net.add_edge("sum", "hidden")
    net.add_edge("hidden", "image", nn.Linear(3, 3))
    x = torch.ones(2, 3, requires_grad=True)
    sim = pcsim.Simulator(net, pcsim.Relaxation(2, 0.1), engine=engine)
    for _ in range(2):
        for clamps in ({"given": x}, {"image": x}, {"given": x, "image": x}):
            found = sim.predict(clamps)
            assert found.keys() == net.nodes.keys()
            assert not any(value.requires_grad for value in found.values())
        net.add_edge("image", "hidden", nn.Linear(3, 3))  # a cycle


def test_predict_is_the_forward_pass_where_that_is_exact(engine: str) -> None:
    net = chain([3, 4, 4, 2], nn.Tanh)
    x = draw(5, 3)
    predicted = pcsim.Simulator(net, engine=engine).predict({"input": x})
    for name, expected in zip(names(net), plain(net, torch.tanh).forward(x), strict=True):
        assert_close(predicted[name], expected.detach(), 1e-14)


# Equilibrium and curvature


@pytest.mark.parametrize("make", [linear_chain, linear_skip, linear_cycle, linear_partial, linear_prior])
def test_the_equilibrium_of_a_linear_network_is_the_sparse_solution(
    engine: str, make: Callable[[], tuple[pcsim.Network, Clamps]]
) -> None:
    net, clamps = make()
    net.double()
    expected, least, most = solved(net, clamps)
    sim = pcsim.Simulator(net, engine=engine)
    sim.equilibrium(clamps)
    for name, node in net.nodes.items():
        assert_close(node.value, expected[name], 1e-12)
    found = pcsim.diagnosis.curvature(sim, clamps)
    assert math.isclose(found.smallest, least, rel_tol=1e-8)
    assert math.isclose(found.largest, most, rel_tol=1e-8)


@pytest.mark.parametrize("make", [linear_chain, linear_cycle], ids=lambda make: make.__name__)
def test_a_safe_rate_converges_and_a_larger_one_does_not(make: Callable[[], tuple[pcsim.Network, Clamps]]) -> None:
    net, clamps = make()
    net.double()
    rate = pcsim.diagnosis.curvature(pcsim.Simulator(net), clamps).safe_rate
    expected, _, _ = solved(net, clamps)
    pcsim.Simulator(net, pcsim.Relaxation(3000, 0.95 * rate)).infer(clamps)
    for name, node in net.nodes.items():
        assert_close(node.value, expected[name], 1e-6)
    with pytest.raises(pcsim.errors.DivergenceError):
        pcsim.Simulator(net, pcsim.Relaxation(2000, 1.15 * rate)).infer(clamps)


@pytest.mark.parametrize("transfer", [nn.Tanh, nn.GELU])
def test_at_equilibrium_every_pull_balances_the_messages(engine: str, transfer: Callable[[], nn.Module]) -> None:
    net = chain([3, 6, 5, 2], transfer)
    given = {"input": draw(4, 3), "output": draw(4, 2)}
    net.nodes["hidden2"].own_precision = 2.5
    sim = pcsim.Simulator(net, pcsim.Relaxation(30, 0.1), engine=engine)
    trace = sim.equilibrium(given, tolerance=1e-9)
    assert trace.steps == 0
    for name in ("hidden1", "hidden2"):
        pull = net[name].precision * net[name].error - sum(edge.message for edge in net[name].outgoing)
        assert float(pull.abs().max()) < 1e-9
    far = {name: net[name].value + 0.3 for name in ("hidden1", "hidden2")}
    sim.equilibrium(given, init=far)
    rest = {name: net[name].value for name in far}
    long = pcsim.Simulator(net, pcsim.Relaxation(5000, 0.1))
    long.infer(given, init=rest)
    for name, value in rest.items():
        assert_close(net[name].value, value, 1e-8)


def test_the_energy_at_rest_of_a_linear_chain_in_closed_form() -> None:
    """½ (y − W₃W₂W₁x)ᵀ S⁻¹ (y − W₃W₂W₁x), S = 1 + W₃W₃ᵀ + W₃W₂W₂ᵀW₃ᵀ (Innocenti et al., arXiv 2408.11979)."""
    net = pcsim.topologies.mlp([3, 5, 4, 2], activation=nn.Identity, bias=False).double()
    first, second, third = (edge.module.weight.detach() for edge in net.edges.values())
    x, y = draw(6, 3), draw(6, 2)
    pcsim.Simulator(net).equilibrium({"input": x, "output": y})
    gap = y - x @ (third @ second @ first).mT
    both = third @ second
    spread = torch.eye(2, dtype=torch.float64) + third @ third.mT + both @ both.mT
    expected = 0.5 * (gap * torch.linalg.solve(spread, gap.mT).mT).sum(1)
    assert_close(sum(node.energy for node in net.nodes.values()), expected, 1e-12)
    assert_close(pcsim.diagnosis.chain_energy_at_rest(net, {"input": x, "output": y}), expected, 1e-12)


def test_the_closed_form_knows_precisions_weights_gains_and_deterministic_nodes() -> None:
    net = pcsim.Network()
    net.add_node("x", (3,))
    net.add_node("a", (4,), precision=2.0, energy_weight=0.7)
    net.add_node("d", (4,), deterministic=True)
    net.add_node("b", (4,), precision=torch.tensor([0.5, 1.0, 2.0, 4.0]))
    net.add_node("y", (2,), precision=1.5)
    net.add_edge("x", "a", nn.Linear(3, 4))
    net.add_edge("a", "d", nn.Linear(4, 4), gain=0.6)
    net.add_edge("d", "b")
    net.add_edge("b", "y", nn.Linear(4, 2, bias=False), gain=-1.3)
    net.double()
    given = {"x": draw(5, 3), "y": draw(5, 2)}
    trace = pcsim.Simulator(net).equilibrium(given, tolerance=1e-12)
    assert trace.steps == 0
    energies = [n.energy_weight * (n.precision * 0.5 * n.error.square()).sum(1) for n in map(net.__getitem__, "aby")]
    assert_close(pcsim.diagnosis.chain_energy_at_rest(net, given), torch.stack(energies).sum(0), 1e-11)


def test_the_closed_form_is_of_linear_chains_alone() -> None:
    tanh, given = chain([3, 4, 2], nn.Tanh), {"input": draw(2, 3), "output": draw(2, 2)}
    with pytest.raises(SettingError, match="node 'hidden1' is not predicted by its edge alone"):
        pcsim.diagnosis.chain_energy_at_rest(tanh, given)
    with pytest.raises(SettingError, match="clamped at both ends and nowhere else"):
        pcsim.diagnosis.chain_energy_at_rest(tanh, {"input": given["input"]})
    skip, clamps = linear_skip()
    with pytest.raises(SettingError, match="expected a chain"):
        pcsim.diagnosis.chain_energy_at_rest(skip.double(), clamps)


def test_how_far_a_relaxation_comes_is_told_in_words() -> None:
    net, given = chain([3, 6, 5, 2], nn.Tanh), {"input": draw(4, 3), "output": draw(4, 2)}
    for steps, rate, words in ((3, 0.01, "backprop-like"), (12, 0.1, "on the way"), (800, 0.2, "at rest")):
        found = pcsim.diagnosis.curvature(pcsim.Simulator(net, pcsim.Relaxation(steps, rate)), given)
        assert words in found.verdict, found
        assert net["hidden1"].value.shape == (4, 6)
    assert "safe rates below" in str(found)


def test_curvature_can_be_asked_whatever_the_weights_learn_from() -> None:
    net, given = chain([3, 6, 5, 2], nn.Tanh), {"input": draw(4, 3), "output": draw(4, 2)}
    expected = pcsim.diagnosis.curvature(pcsim.Simulator(net, pcsim.Relaxation(3, 0.1)), given)
    arriving = pcsim.Relaxation(3, 0.1, precision=pcsim.Spiking.for_rate(0.1))
    for relaxation, rule in ((arriving, pcsim.ArrivalUpdate()), (pcsim.Relaxation(3, 0.1), pcsim.IncrementalUpdate())):
        sim = pcsim.Simulator(net, relaxation, rule)
        found = pcsim.diagnosis.curvature(sim, given)
        assert math.isclose(found.largest, expected.largest, rel_tol=1e-9)
    sim = pcsim.Simulator(net, arriving, pcsim.ArrivalUpdate())
    sim.equilibrium(given)
    with pytest.raises(pcsim.errors.StateError, match="infer again"):
        sim.compute_gradients()


def test_what_has_no_equilibrium_says_so() -> None:
    net = chain([3, 4, 2], nn.Tanh)
    given = {"input": draw(4, 3), "output": draw(4, 2)}
    with pytest.raises(SettingError, match="tolerance -1 given"):
        pcsim.Simulator(net).equilibrium(given, tolerance=-1)
    with pytest.raises(SettingError, match="predictions are held"):
        pcsim.Simulator(net, pcsim.Relaxation(hold_predictions=True)).equilibrium(given)
    with pytest.raises(pcsim.errors.ConvergenceError, match="largest derivative of F is still"):
        pcsim.Simulator(net).equilibrium(given, tolerance=1e-300)
    with pytest.raises(pcsim.errors.StateError, match="no unit is free"):
        pcsim.diagnosis.curvature(pcsim.Simulator(net), {**given, "hidden1": draw(4, 4)})


# Sampling


def test_sampled_values_have_the_mean_and_covariance_of_the_posterior(engine: str) -> None:
    """A step v − r H (v − μ) + √(2 r T) ξ rests at N(μ, T H⁻¹ (1 − r H / 2)⁻¹); five standard errors are allowed.

    Of 7 means and 28 covariances one is further off by chance once in 50,000 seeds.
    """
    net, temperature, rate, chains = chain([2, 4, 3, 2], nn.Identity), 0.5, 0.2, 6000
    given = {"input": draw(1, 2).expand(chains, 2), "output": draw(1, 2).expand(chains, 2)}
    mean, _, _ = solved(net, {name: value[:1] for name, value in given.items()})
    system = assemble(net)
    free = np.ones(system.matrix.shape[1], bool)
    for name in given:
        free[system.place[name]] = False
    matrix = system.matrix.toarray()[:, free]
    hessian = matrix.T @ system.scale.toarray() @ matrix
    torch.manual_seed(3)
    pcsim.Simulator(net, pcsim.Relaxation(150, rate, temperature=temperature), engine=engine).infer(given)
    hidden = ("hidden1", "hidden2")
    found = torch.cat([net[name].value for name in hidden], 1).numpy()
    covariance = temperature * np.linalg.inv(hessian @ (np.eye(len(hessian)) - rate * hessian / 2))
    spread = np.sqrt(np.diag(covariance))
    off = found.mean(0) - torch.cat([mean[name][0] for name in hidden]).numpy()
    assert np.abs(off / spread).max() * math.sqrt(chains) < 5
    gap = (np.cov(found.T) - covariance) / np.sqrt(covariance**2 + np.outer(spread, spread) ** 2)
    assert np.abs(gap).max() * math.sqrt(chains) < 5


def test_noise_is_one_s_own_at_each_node_and_step_and_the_same_for_the_same_seed() -> None:
    relaxation, like = pcsim.Relaxation(3, 0.2, temperature=0.5), torch.zeros(2, 4)
    drawn = [relaxation.noise(like, *which) for which in ((5, "a", 0), (5, "b", 0), (5, "a", 1), (6, "a", 0))]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(drawn, 2))
    assert torch.equal(relaxation.noise(like, 5, "a", 0), drawn[0])


def prior_of_images() -> pcsim.Network:
    """Two causes of their own precision, and an image of theirs."""
    torch.manual_seed(1)
    net = pcsim.Network()
    net.add_node("cause", (2,), prior=[0.5, -1.0], precision=2.0)
    net.add_node("image", (3,), precision=0.5)
    net.add_edge("cause", "image", nn.Linear(2, 3))
    return net.double()


def test_without_clamps_values_are_sampled_from_the_model(engine: str) -> None:
    """As above, of causes and images together: μ and H follow from F = Σ ½ π ‖v − u‖². Five standard errors."""
    net, rate, samples = prior_of_images(), 0.2, 4000
    linear = net.edges["cause->image"].module
    weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    hessian = np.block([[2 * np.eye(2) + 0.5 * weight.T @ weight, -0.5 * weight.T], [-0.5 * weight, 0.5 * np.eye(3)]])
    cause = np.array([0.5, -1.0])
    torch.manual_seed(3)
    trace = pcsim.Simulator(net, pcsim.Relaxation(150, rate, temperature=1.0), engine=engine).infer({}, batch=samples)
    assert trace.steps == 150
    found = torch.cat([net[name].value for name in ("cause", "image")], 1).numpy()
    covariance = np.linalg.inv(hessian @ (np.eye(5) - rate * hessian / 2))
    spread = np.sqrt(np.diag(covariance))
    off = found.mean(0) - np.concatenate([cause, weight @ cause + bias])
    assert np.abs(off / spread).max() * math.sqrt(samples) < 5
    gap = (np.cov(found.T) - covariance) / np.sqrt(covariance**2 + np.outer(spread, spread) ** 2)
    assert np.abs(gap).max() * math.sqrt(samples) < 5


def test_without_clamps_and_noise_values_rest_at_what_the_prior_predicts(engine: str) -> None:
    net = prior_of_images()
    sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1), engine=engine)
    sim.infer({}, batch=2)
    expected = net.edges["cause->image"].module(torch.tensor([[0.5, -1.0]]).double()).detach()
    assert_close(net["image"].value, expected.expand(2, 3), 1e-15)
    elsewhere = draw(2, 2)
    sim.infer({}, batch=2, init={"cause": elsewhere})
    assert not torch.allclose(net["cause"].value, torch.tensor([[0.5, -1.0]]).double())
    with pytest.raises(pcsim.errors.StateError, match="no clamped node has an incoming edge or a prior"):
        sim.learn(torch.optim.SGD(net.parameters(), lr=0.1))


def test_a_number_of_samples_is_checked() -> None:
    net, image = prior_of_images(), draw(4, 3)
    sim = pcsim.Simulator(net, pcsim.Relaxation(1, 0.1))
    sim.infer({"image": image}, batch=4)
    for batch, clamps, words in (
        (3, {"image": image}, "batch=3 given, but 'image' is clamped for 4"),
        (0, {}, "batch=0 given, expected a whole number of samples"),
        (True, {}, "batch=True given"),
        (2.0, {}, "batch=2.0 given"),
        (None, {}, r"the batch size is unknown; clamp at least one node, or give infer\(batch=\)"),
    ):
        with pytest.raises(pcsim.errors.ClampError, match=words):
            sim.infer(clamps, batch=batch)  # type: ignore[arg-type]
    with pytest.raises(pcsim.errors.ClampError, match="init 'cause': batch of 3 given, but batch is 2"):
        sim.infer({}, batch=2, init={"cause": draw(3, 2)})
    with pytest.raises(pcsim.errors.ClampError, match="root 'input' has no prior"):
        pcsim.Simulator(chain([2, 2], nn.Tanh)).infer({}, batch=2)


def test_samples_are_those_of_the_torch_seed_and_differ_between_batches() -> None:
    net, given = chain([2, 4, 2], nn.Tanh), {"input": draw(3, 2), "output": draw(3, 2)}
    taken = []
    for engine in ("batched", "reference"):
        sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1, temperature=0.3), engine=engine)
        torch.manual_seed(7)
        for _ in range(2):
            sim.infer(given)
            taken.append(net["hidden1"].value)
    assert not torch.allclose(taken[0], taken[1], atol=1e-3)
    assert_close(taken[0], taken[2], 1e-12)
    assert_close(taken[1], taken[3], 1e-12)
    assert torch.equal(sim.predict({"input": given["input"]})["output"], net["output"].forward_prediction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: given -0.1, expected a number of at least 0"),
        ({"temperature": True}, "temperature: given True, expected a finite number"),
        ({"temperature": 0.1, "momentum": 0.5}, "with momentum=0.5, but samples are taken by plain steps"),
        ({"temperature": 0.1, "tolerance": 1e-3}, "with tolerance=0.001"),
    ],
)
def test_a_temperature_says_what_it_takes(options: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        pcsim.Relaxation(**options)  # type: ignore[arg-type]


# Multipliers


def linear_residual() -> tuple[pcsim.Network, Clamps]:
    """Two blocks with identity skips into deterministic sums."""
    net = pcsim.topologies.residual_mlp(3, 4, 2, blocks=2, activation=nn.Identity)
    return net, {"input": draw(4, 3), "output": draw(4, 2)}


@pytest.mark.parametrize("build", [linear_chain, linear_residual])
def test_multipliers_come_to_backprops_gradient_in_a_linear_network(
    build: Callable[[], tuple[pcsim.Network, Clamps]],
) -> None:
    net, clamps = build()
    net.double()
    relaxation = pcsim.Relaxation(3000, 0.1, multipliers=0.1)
    sim = pcsim.Simulator(net, relaxation)
    sim.infer(clamps)
    found = _by_name(net, sim.gradients())
    for node in net.nodes.values():
        if node.name not in clamps and node.predicted:
            assert_close(node.value, node.prediction, 1e-4)
    plain_rule = pcsim.Simulator(net, rule=pcsim.Backprop())
    plain_rule.infer(clamps)
    exact = _by_name(net, plain_rule.gradients())
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        assert_close(found[name], gradient, 1e-4)


def _by_name(net: pcsim.Network, gradients: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    return {name: gradients[parameter] for name, parameter in net.named_parameters() if parameter in gradients}


def test_a_multiplier_grows_by_its_error_after_each_step(engine: str) -> None:
    """x -> h -> y, all identities, worked out by hand for two steps of rate ½ and α = ¼."""
    net = pcsim.Network()
    for name in ("x", "h", "y"):
        net.add_node(name, (1,))
    net.add_edge("x", "h")
    net.add_edge("h", "y")
    net.double()
    given = {"x": torch.zeros(1, 1, dtype=torch.float64), "y": torch.ones(1, 1, dtype=torch.float64)}
    pcsim.Simulator(net, pcsim.Relaxation(2, 0.5, multipliers=0.25), engine=engine).infer(given)
    # Step 0: h = 0 + ½ (1 − 0) = ½, λ = ¼ · ½ = ⅛. Step 1: h = ½ + ½ (½ − (½ + ⅛)) = 7/16.
    assert_close(net["h"].value, torch.tensor([[7 / 16]], dtype=torch.float64), 1e-15)


@pytest.mark.parametrize("rule", [pcsim.ForwardUpdate(), pcsim.IncrementalUpdate(), pcsim.ArrivalUpdate()])
def test_multipliers_are_refused_where_a_rule_knows_nothing_of_them(rule: pcsim.LearningRule) -> None:
    net = chain([2, 3, 2], nn.Tanh)
    with pytest.raises(SettingError, match="knows nothing of multipliers"):
        pcsim.Simulator(net, pcsim.Relaxation(multipliers=0.1), rule).infer({"input": draw(2, 2), "output": draw(2, 2)})
    with pytest.raises(SettingError, match="with hold_predictions=True, but multipliers grow"):
        pcsim.Relaxation(multipliers=0.1, hold_predictions=True)


# Momentum against torch.optim


@pytest.mark.parametrize("schedule", [pcsim.Constant(0.7), pcsim.Spiking(alpha=0.1, peak=2.0)], ids=["flat", "spiking"])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)])
def test_momentum_is_that_of_torch_optim(
    engine: str, momentum: float, nesterov: bool, schedule: pcsim.PrecisionSchedule
) -> None:
    net, rate, steps = chain([3, 4, 5, 2], nn.Tanh), 0.2, 9
    x, y = draw(3, 3), draw(3, 2)
    relaxation = pcsim.Relaxation(steps, rate, precision=schedule, momentum=momentum, nesterov=nesterov)
    pcsim.Simulator(net, relaxation, engine=engine).infer({"input": x, "output": y})

    model = plain(net, torch.tanh)
    hidden = [value.detach().requires_grad_() for value in model.forward(x)[1:-1]]
    optimizer = optim.SGD(hidden, lr=rate, momentum=momentum, nesterov=nesterov)
    for step in range(steps):
        optimizer.zero_grad()
        scales = [0.7] * 3 if isinstance(schedule, pcsim.Constant) else spiking(step, 3, 0.1, 2.0)
        model.total([x, *hidden, y], scales).backward()
        optimizer.step()
    for name, expected in zip(("hidden1", "hidden2"), hidden, strict=True):
        assert_close(net[name].value, expected.detach())
        assert not torch.allclose(net[name].value, net[name].forward_value, atol=1e-3)


# Spiking precision


def delay_line(length: int, weight: float) -> pcsim.Network:
    """x -> n{length} -> ... -> n1 -> y, all identities; n{k} is at level k."""
    net = pcsim.Network()
    previous = net.add_node("x", (2,))
    for level in range(length, 0, -1):
        node = net.add_node(f"n{level}", (2,), energy_weight=weight)
        net.add_edge(previous, node)
        previous = node
    net.add_edge(previous, net.add_node("y", (2,)))
    return net.double()


@pytest.mark.filterwarnings(TOO_SHORT)
@pytest.mark.parametrize("rate", [0.5, 0.3, 0.8])
def test_a_spiking_identity_chain_is_a_delay_line(engine: str, rate: float) -> None:
    length = 4
    net, x, y = delay_line(length, 1 / rate), draw(3, 2), draw(3, 2)
    whole = rate * (y - x)
    for steps in range(length + 3):
        relaxation = pcsim.Relaxation(steps, rate, precision=pcsim.Spiking(alpha=0.0))
        pcsim.Simulator(net, relaxation, engine=engine).infer({"x": x, "y": y})
        for level in range(1, length + 1):
            displacement = whole if level == steps else torch.zeros_like(whole)
            assert_close(net[f"n{level}"].value - x, displacement, 1e-14)


@pytest.mark.filterwarnings(TOO_SHORT)
def test_spiking_as_covariance(engine: str) -> None:
    schedule = pcsim.Spiking.as_covariance(0.25)
    assert schedule == pcsim.Spiking(alpha=1.0, peak=4.0)
    assert [schedule.at(step, 2, 5) for step in range(5)] == [1.0, 1.0, 4.0, 1.0, 1.0]
    assert schedule.at(0, None, 5) == 1.0
    # At the arrival rate * precision = 1: the error goes on whole and the node's own is wiped.
    net, x, y = delay_line(3, 1.0), draw(2, 2), draw(2, 2)
    whole, none = y - x, torch.zeros_like(x)
    for steps, displacements in ((1, (whole, none, none)), (2, (none, whole, none))):
        relaxation = pcsim.Relaxation(steps, 0.25, precision=schedule)
        pcsim.Simulator(net, relaxation, engine=engine).infer({"x": x, "y": y})
        for level, displacement in enumerate(displacements, start=1):
            assert_close(net[f"n{level}"].value - x, displacement, 1e-14)


@pytest.mark.parametrize("rate", [0.0, -0.5])
def test_spiking_as_covariance_needs_a_positive_rate(rate: float) -> None:
    with pytest.raises(SettingError, match="as_covariance"):
        pcsim.Spiking.as_covariance(rate)


def test_spiking_warns_where_it_does_not_arrive(engine: str) -> None:
    relaxation = pcsim.Relaxation(2, precision=pcsim.Spiking())
    with pytest.warns(PrecisionWarning, match=r"'n3' \(level 3\), 'n2' \(level 2\) within 2 steps"):
        pcsim.Simulator(delay_line(3, 1.0), relaxation, engine=engine).infer({"x": draw(1, 2), "y": draw(1, 2)})


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "linear": (nn.Identity, identity),
    "tanh": (nn.Tanh, torch.tanh),
    "gelu": (nn.GELU, functional.gelu),
}


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("latents", ["after", "before"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_spiking_with_the_forward_rule_is_scaled_backprop_on_a_chain(
    engine: str, activation: str, latents: str, extra: int, rate: float
) -> None:
    make, function = ACTIVATIONS[activation]
    sizes = [3, 5, 4, 6, 2]
    net = chain(sizes, make, latents=latents)
    x, y = draw(4, 3), draw(4, 2)
    depth = len(sizes) - 1
    relaxation = pcsim.Relaxation(depth + extra, rate, precision=pcsim.Spiking(alpha=0.0))
    simulator = pcsim.Simulator(net, relaxation, pcsim.ForwardUpdate(), engine=engine)
    simulator.infer({"input": x, "output": y})
    simulator.compute_gradients()

    model = plain(net, function)  # where the latents are cut does not change the composed function
    (0.5 * (y - model.forward(x)[-1]).square().sum() / 4).backward()
    for layer in range(depth):
        level = depth - 1 - layer
        factor = (1 - rate) * rate**level if level else 1.0
        linear = linears(net)[layer]
        for got, leaf in ((linear.weight.grad, model.weights[layer]), (linear.bias.grad, model.biases[layer])):
            assert got is not None
            assert leaf.grad is not None
            expected = factor * leaf.grad
            assert float(expected.abs().max()) > 1e-7
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13 * float(expected.abs().max()) + 1e-15)


# Decaying precision


# T = 5 and level 2: n = 3 terms, 1 + e^-1 + e^-2 = 1.503214724408055.
MULTIPLIED = [0.0, 0.0, 1.0, EULER * 1.503214724408055 / 100, EULER**2 * 1.503214724408055 / 100]
DIVIDED = [0.0, 0.0, 1.0, EULER / 1.503214724408055 / 100, EULER**2 / 1.503214724408055 / 100]


@pytest.mark.parametrize(("tail", "expected"), [("multiplied", MULTIPLIED), ("divided", DIVIDED)])
def test_decaying_tails_by_hand(tail: str, expected: list[float]) -> None:
    schedule = pcsim.Decaying(tail=tail)  # type: ignore[arg-type]
    assert [schedule.at(step, 2, 5) for step in range(5)] == pytest.approx(expected, rel=1e-14, abs=0)
    assert [schedule.at(step, None, 5) for step in range(5)] == [0.0] * 5
    flat = pcsim.Decaying(k=0.0, tail=tail)  # type: ignore[arg-type]
    assert flat.at(4, 1, 5) == pytest.approx(0.04 if tail == "multiplied" else 0.0025, rel=1e-14)
    half = pcsim.Decaying(k=0.5, tail=tail)  # type: ignore[arg-type]
    total = 1 + EULER**0.5 + EULER + EULER**1.5
    share = total if tail == "multiplied" else 1 / total
    assert half.at(2, 0, 4) == pytest.approx(EULER / 100 * share, rel=1e-14)


def test_decaying_multiplies_by_default() -> None:
    assert pcsim.Decaying() == pcsim.Decaying(k=1.0, tail="multiplied")


@pytest.mark.parametrize("tail", ["multiplied", "divided"])
def test_decaying_relaxation_by_hand(engine: str, tail: str) -> None:
    net, x, y, rate = delay_line(1, 1.0), draw(3, 2), draw(3, 2), 0.4
    relaxation = pcsim.Relaxation(3, rate, precision=pcsim.Decaying(tail=tail))  # type: ignore[arg-type]
    pcsim.Simulator(net, relaxation, engine=engine).infer({"x": x, "y": y})
    of_y, of_n = 1 + EULER + EULER**2, 1 + EULER
    if tail == "divided":
        of_y, of_n = 1 / of_y, 1 / of_n
    value = x + rate * (y - x)
    value = value + rate * (EULER / 100 * of_y * (y - value) - (value - x))
    value = value + rate * (EULER**2 / 100 * of_y * (y - value) - EULER / 100 * of_n * (value - x))
    assert_close(net["n1"].value, value, 1e-14)
    assert float(net["n1"].precision) == pytest.approx(EULER / 100 * of_n, rel=1e-14)


def test_decaying_needs_time_to_arrive(engine: str) -> None:
    simulator = pcsim.Simulator(delay_line(3, 1.0), pcsim.Relaxation(3, precision=pcsim.Decaying()), engine=engine)
    with pytest.raises(SettingError, match=r"'n3' \(level 3\)"):
        simulator.infer({"x": draw(1, 2), "y": draw(1, 2)})


# Energies


class LogCosh(pcsim.Energy):
    """A user's own: Σ log cosh(v − u), whose derivative is tanh(v − u)."""

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        return torch.log(torch.cosh(value - prediction))


class Charbonnier(pcsim.Energy):
    """A user's own that does not split over units: √(1 + ‖v − u‖²)."""

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        return (1 + (value - prediction).square().sum(1, keepdim=True)).sqrt()


def log_cosh_slope(error: Tensor) -> Tensor:
    return torch.tanh(error)


def charbonnier_slope(error: Tensor) -> Tensor:
    return error / (1 + error.square().sum(1, keepdim=True)).sqrt()


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2)])
@pytest.mark.parametrize("per_unit", [False, True])
def test_cross_entropy_derivatives_equal_autograd(shape: tuple[int, ...], per_unit: bool) -> None:
    energy = pcsim.CrossEntropy()
    value = torch.softmax(draw(*shape), 1).requires_grad_()
    logits = draw(*shape).requires_grad_()
    scale: Scale = draw(*shape[1:]).exp() if per_unit else 1.7
    total = -(scale * value * (logits - logits.logsumexp(1, keepdim=True))).sum()
    of_value, of_logits = torch.autograd.grad(total, (value, logits))
    with torch.no_grad():
        assert_close(energy.value_gradient(value, logits, scale), of_value)
        assert_close(energy.prediction_gradient(value, logits, scale), of_logits)
        # torch's own takes class probabilities too; it leaves a position to itself.
        each = functional.cross_entropy(logits, value, reduction="none").reshape(len(value), -1).sum(1)
        assert_close(energy.sample_energy(value, logits), each)


@pytest.mark.parametrize(
    ("energy", "slope"), [(LogCosh(), log_cosh_slope), (Charbonnier(), charbonnier_slope)], ids=["log cosh", "norm"]
)
def test_a_user_s_energy_has_the_derivatives_of_its_formula(
    energy: pcsim.Energy, slope: Callable[[Tensor], Tensor]
) -> None:
    value, prediction = draw(3, 4), draw(3, 4)
    with torch.no_grad():
        assert_close(energy.value_gradient(value, prediction, 1.7), 1.7 * slope(value - prediction))
        assert_close(energy.prediction_gradient(value, prediction, 1.7), -1.7 * slope(value - prediction))


COVARIANCE = torch.tensor([[2.0, 0.6, 0.1], [0.6, 1.0, -0.3], [0.1, -0.3, 0.5]], dtype=torch.float64)
LIKELIHOODS: dict[pcsim.Energy, Callable[[Tensor, Tensor], npt.NDArray[np.float64]]] = {
    pcsim.Laplace(0.7): lambda v, u: stats.laplace.logpdf(v, u, 0.7),
    pcsim.StudentT(4.5): lambda v, u: stats.t.logpdf(v, 4.5, u),
    pcsim.Bernoulli(): lambda v, u: stats.bernoulli.logpmf(v.round(), special.expit(u)),
    pcsim.CorrelatedGaussian(COVARIANCE): lambda v, u: np.array(
        [stats.multivariate_normal.logpdf(a, b, COVARIANCE) for a, b in zip(v, u, strict=True)]
    ),
}


@pytest.mark.parametrize("energy", LIKELIHOODS, ids=lambda energy: type(energy).__name__)
def test_an_energy_is_a_negative_log_likelihood_up_to_a_constant(energy: pcsim.Energy) -> None:
    value, prediction = draw(5, 3), draw(5, 3)
    if isinstance(energy, pcsim.Bernoulli):
        value = (value > 0).double()
    own = energy.unit_energy(value, prediction).numpy()
    likelihood = LIKELIHOODS[energy](value.numpy(), prediction.numpy())
    gap = own + likelihood.reshape(own.shape)
    np.testing.assert_allclose(gap, gap.flat[0], rtol=0, atol=1e-12)


ENERGIES = (*LIKELIHOODS, pcsim.Huber(0.8), pcsim.CrossEntropy(axis=1), pcsim.CrossEntropy(axis=-1))


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_the_classes_of_a_cross_entropy_lie_along_the_axis_that_is_said(axis: int) -> None:
    value, prediction = draw(4, 3, 2), draw(4, 3, 2)
    found = [pcsim.CrossEntropy(axis).unit_energy(value, prediction)[sample] for sample in range(4)]
    for sample, energy in enumerate(found):
        logs = special.log_softmax(prediction[sample].numpy(), axis)
        np.testing.assert_allclose(energy.numpy(), -value[sample].numpy() * logs, rtol=1e-12)


@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_energies_have_the_derivatives_of_their_formula(energy: pcsim.Energy) -> None:
    shape = (3,) if isinstance(energy, pcsim.CorrelatedGaussian) else (3, 2)
    value, prediction, scale = draw(4, *shape), draw(4, *shape), 1.7
    by_formula = pcsim.Energy.value_gradient(energy, value, prediction, scale)
    assert_close(energy.value_gradient(value, prediction, scale), by_formula, 1e-12)
    by_formula = pcsim.Energy.prediction_gradient(energy, value, prediction, scale)
    assert_close(energy.prediction_gradient(value, prediction, scale), by_formula, 1e-12)
    if energy.rests_at_prediction:
        for gradient in (energy.value_gradient, energy.prediction_gradient):
            assert not gradient(value, value, scale).any()


@pytest.mark.parametrize("energy", [e for e in ENERGIES if e.has_minimum], ids=repr)
def test_a_free_node_rests_where_an_energy_balances_its_children(engine: str, energy: pcsim.Energy) -> None:
    """One free node between a clamped source and a clamped target: ∂E/∂v = target − v at rest."""
    net = pcsim.Network()
    for name, own in (("x", None), ("v", energy), ("y", None)):
        net.add_node(name, (3,), energy=own)
    net.add_edge("x", "v")
    net.add_edge("v", "y")
    given = {"x": draw(2, 3), "y": draw(2, 3)}
    pcsim.Simulator(net, pcsim.Relaxation(1200, 0.02), engine=engine).infer(given)
    value = net["v"].value
    pull, message = energy.value_gradient(value, given["x"], 1.0), given["y"] - value
    if isinstance(energy, pcsim.Laplace):  # its pull jumps at the prediction, about which the value hovers
        apart = (value - given["x"]).abs() > 0.1
        pull, message = pull[apart], message[apart]
    assert_close(pull, message, 1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pcsim.Laplace(0), "Laplace.width: given 0, expected a positive finite number"),
        (lambda: pcsim.Huber(-1.0), "Huber.threshold: given -1.0, expected a positive"),
        (lambda: pcsim.StudentT(float("inf")), "StudentT.freedom: given inf"),
        (lambda: pcsim.CrossEntropy(1.5), "CrossEntropy.axis: given 1.5"),
        (lambda: pcsim.CorrelatedGaussian(torch.ones(2)), r"covariance: given \(2,\), expected a square matrix"),
        (lambda: pcsim.CorrelatedGaussian(-torch.eye(2)), "expected a symmetric, positive definite matrix"),
    ],
)
def test_energies_say_what_they_take(make: Callable[[], pcsim.Energy], message: str) -> None:
    with pytest.raises(pcsim.errors.GraphError, match=message):
        make()


@pytest.mark.parametrize(
    ("energy", "shape"), [(pcsim.CrossEntropy(axis=2), (3, 2)), (pcsim.CorrelatedGaussian(COVARIANCE), (4,))]
)
def test_an_energy_that_does_not_fit_its_node_is_refused(energy: pcsim.Energy, shape: tuple[int, ...]) -> None:
    with pytest.raises(pcsim.errors.GraphError, match="'y'"):
        pcsim.Network().add_node("y", shape, energy=energy)


@pytest.mark.parametrize(
    ("energy", "slope"), [(LogCosh(), log_cosh_slope), (Charbonnier(), charbonnier_slope)], ids=["log cosh", "norm"]
)
def test_energies_in_a_network_by_hand(engine: str, energy: pcsim.Energy, slope: Callable[[Tensor], Tensor]) -> None:
    """A user's energy at the hidden node, cross-entropy at the output: latents and gradients after three steps."""
    net = pcsim.Network()
    net.add_node("x", (3,))
    net.add_node("h", (4,), energy=energy, energy_weight=1.5)
    net.add_node("y", (3,), energy=pcsim.CrossEntropy(), precision=0.8)
    add(net, "x", "h")
    add(net, "h", "y")
    net.double()
    x, y = draw(5, 3), torch.eye(3, dtype=torch.float64)[[0, 2, 1, 1, 0]]
    (first, second), rate = linears(net), 0.3
    simulator = pcsim.Simulator(net, pcsim.Relaxation(3, rate), engine=engine)
    simulator.infer({"x": x, "y": y})
    simulator.compute_gradients()
    with torch.no_grad():
        predicted = x @ first.weight.T + first.bias
        hidden = predicted
        for _ in range(3):
            logits = hidden @ second.weight.T + second.bias
            hidden = hidden + rate * (
                0.8 * (y - torch.softmax(logits, 1)) @ second.weight - 1.5 * slope(hidden - predicted)
            )
        at_output = y - torch.softmax(hidden @ second.weight.T + second.bias, 1)
        at_hidden = 1.5 * slope(hidden - predicted)
    assert_close(net["h"].value, hidden)
    expected = [-at_hidden.T @ x / 5, -at_hidden.mean(0), -at_output.T @ hidden / 5, -at_output.mean(0)]
    for got, wanted in zip(grads(net), expected, strict=True):
        assert_close(got, wanted)
        assert float(wanted.abs().max()) > 1e-4


@pytest.mark.parametrize("rule", [pcsim.SettledUpdate(), pcsim.ForwardUpdate(), pcsim.IncrementalUpdate()], ids=str)
@pytest.mark.parametrize("per_unit", [False, True])
def test_learned_precision_rests_at_the_inverse_mean_squared_error(
    engine: str, per_unit: bool, rule: pcsim.LearningRule
) -> None:
    net = pcsim.Network()
    net.add_node("x", (3,))
    node = net.add_node("y", (4,), precision=pcsim.LearnedPrecision(2.0, per_unit=per_unit), energy_weight=0.5)
    add(net, "x", "y")
    net.double()
    x, y = draw(6, 3), draw(6, 4)
    squared = (y - linears(net)[0](x)).square().detach()
    expected = 1 / (squared.mean(0) if per_unit else squared.mean())
    assert node.log_precision is not None
    simulator = pcsim.Simulator(net, pcsim.Relaxation(1), rule, engine=engine)
    # The curvature in log π is weight / 2 for each unit that shares it: half of Newton's step.
    optimizer = optim.SGD([node.log_precision], lr=2.0 if per_unit else 0.5)
    for _ in range(80):
        simulator.update({"x": x, "y": y}, optimizer)
    assert_close(node.log_precision.detach().exp(), expected, 1e-10)
    assert not torch.allclose(expected, torch.full_like(expected, 2.0), rtol=0.05)


# What a run records, and when it stops


@pytest.mark.filterwarnings(TOO_SHORT)
def test_recorded_energies_are_those_of_runs_of_each_length(engine: str) -> None:
    net = pcsim.Network()
    net.add_node("x", (3,))
    net.add_node("a", (4,), transfer=nn.Tanh(), energy_weight=1.3)
    net.add_node("b", (4,), transfer=nn.Tanh(), precision=pcsim.LearnedPrecision(1.6))
    net.add_node("y", (2,), precision=0.7)
    for source, target in (("x", "a"), ("a", "b"), ("b", "y")):
        add(net, source, target)
    net.double()
    x, y = draw(5, 3), draw(5, 2)
    model, steps = plain(net, torch.tanh), 6
    relaxation = pcsim.Relaxation(steps, 0.3, precision=pcsim.Spiking(alpha=0.2, peak=1.5), momentum=0.4)
    trace = pcsim.Simulator(net, relaxation, engine=engine).infer({"x": x, "y": y}, record=True)
    assert trace.steps == steps
    assert trace.nodes == ("a", "b", "y")
    assert trace.energies is not None
    assert trace.free_energies is not None
    assert trace.energies.shape == (steps + 1, 3, 5)
    assert trace.free_energies.shape == (steps + 1,)
    log_precision = net["b"].log_precision
    assert log_precision is not None
    learned = log_precision.item()
    assert learned == pytest.approx(math.log(1.6), rel=1e-6)  # rounded to single precision before the conversion
    normaliser = -0.5 * learned * 4 * 5
    for row in range(steps + 1):
        pcsim.Simulator(net, attrs.evolve(relaxation, steps=row), engine=engine).infer({"x": x, "y": y})
        values = read(net)
        scheduled = spiking(min(row, steps - 1), 3, 0.2, 1.5)
        scales = [pi * own for pi, own in zip(scheduled, (1.3, math.exp(learned), 0.7), strict=True)]
        with torch.no_grad():
            assert_close(trace.energies[row], torch.stack(model.energies(values)))
            assert_close(trace.free_energies[row], model.total(values, scales) + normaliser)
    assert torch.equal(trace.energy("b"), trace.energies[:, 1])
    assert len(torch.unique(trace.free_energies)) == steps + 1


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_tolerance_stops_after_the_first_small_update(engine: str, tolerance: float) -> None:
    net, rate = chain([3, 4, 5, 2], nn.Tanh), 0.3
    x, y = draw(3, 3), draw(3, 2)
    relaxation = pcsim.Relaxation(2000, rate, tolerance=tolerance)
    trace = pcsim.Simulator(net, relaxation, engine=engine).infer({"input": x, "output": y})
    model = plain(net, torch.tanh)
    hidden = [value.detach().requires_grad_() for value in model.forward(x)[1:-1]]
    for step in range(2000):
        gradients = torch.autograd.grad(model.total([x, *hidden, y], [1.0] * 3), hidden)
        hidden = [(h - rate * g).detach().requires_grad_() for h, g in zip(hidden, gradients, strict=True)]
        if step >= 2 and max(float((rate * g).abs().max()) for g in gradients) < tolerance:
            break
    assert trace.steps == step + 1
    assert 5 < trace.steps < 2000
    assert_close(net["hidden1"].value, hidden[0].detach())


def test_tolerance_waits_for_the_error_to_arrive(engine: str) -> None:
    """Every update is under the tolerance; the deepest of the five nodes is reached at step 5."""
    relaxation = pcsim.Relaxation(50, 0.5, tolerance=1e6)
    trace = pcsim.Simulator(delay_line(5, 1.0), relaxation, engine=engine).infer({"x": draw(2, 2), "y": draw(2, 2)})
    assert trace.steps == 6


# Learning rules


@pytest.mark.parametrize("output", ["gaussian", "cross-entropy"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backprop_rule_is_autograd_of_the_composed_function(engine: str, activation: str, output: str) -> None:
    """Two layers and a skip past them, at a latent node: every free node is deterministic here."""
    make, function = ACTIVATIONS[activation]
    net = pcsim.Network()
    net.add_node("x", (3,))
    for name in ("a", "b", "c"):
        net.add_node(name, (4,), transfer=make())
    net.add_node("y", (3,), energy=pcsim.CrossEntropy() if output == "cross-entropy" else None)
    for source, target, gain in (("x", "a", 1.0), ("a", "b", 0.5), ("b", "c", 1.0), ("a", "c", -2.0), ("c", "y", 1.0)):
        add(net, source, target, gain=gain)
    net.double()
    x, y = draw(4, 3), torch.softmax(draw(4, 3), 1)
    simulator = pcsim.Simulator(net, pcsim.Relaxation(7), pcsim.Backprop(), engine=engine)
    simulator.infer({"x": x, "y": y})
    simulator.compute_gradients()

    model = plain(net, function)
    (w1, b1, w2, b2, w3, b3, w4, b4, w5, b5) = model.parameters
    a = function(x @ w1.T + b1)
    b = function(0.5 * (a @ w2.T + b2))
    c = function(b @ w3.T + b3 - 2.0 * (a @ w4.T + b4))
    u = c @ w5.T + b5
    loss = (
        functional.cross_entropy(u, y, reduction="sum") if output == "cross-entropy" else 0.5 * (y - u).square().sum()
    )
    expected = torch.autograd.grad(loss / 4, model.parameters)
    for got, wanted in zip(grads(net), expected, strict=True):
        assert float((got - wanted).abs().max()) <= 1e-14 * max(1.0, float(wanted.abs().max()))
        assert float(wanted.abs().max()) > 1e-5
    assert_close(net["y"].forward_prediction, u.detach(), 1e-14)


def test_forward_rule_is_the_settled_rule_before_the_first_step(engine: str) -> None:
    """Both are the delta rule for the edge into the target, and zero elsewhere; later they differ."""
    net, x, y = chain([3, 4, 5, 2], nn.Tanh), draw(4, 3), draw(4, 2)
    found = {}
    for steps in (0, 4):
        for rule in (pcsim.SettledUpdate(), pcsim.ForwardUpdate()):
            simulator = pcsim.Simulator(net, pcsim.Relaxation(steps, 0.3), rule, engine=engine)
            simulator.infer({"input": x, "output": y})
            simulator.compute_gradients()
            found[steps, rule] = grads(net)
    values = plain(net, torch.tanh).forward(x)
    error = (y - values[-1]).detach()
    for got in (found[0, pcsim.SettledUpdate()], found[0, pcsim.ForwardUpdate()]):
        assert all(not gradient.any() for gradient in got[:-2])
        assert_close(got[-2], -error.T @ values[-2].detach() / 4, 1e-14)
        assert_close(got[-1], -error.mean(0), 1e-14)
    settled, forward = found[4, pcsim.SettledUpdate()], found[4, pcsim.ForwardUpdate()]
    # The first edge reads the clamped input, which does not move.
    assert not any(torch.allclose(one, other, rtol=1e-3) for one, other in zip(settled[2:], forward[2:], strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("schedule", [pcsim.Constant(0.8), pcsim.Spiking(alpha=0.1, peak=1.5)], ids=["flat", "spiking"])
def test_incremental_rule_is_descent_of_latents_and_weights_together(
    engine: str, schedule: pcsim.PrecisionSchedule, momentum: float
) -> None:
    net, rate, steps, lr = chain([3, 4, 5, 2], nn.Tanh), 0.3, 6, 0.1
    batches = [(draw(4, 3), draw(4, 2)) for _ in range(2)]
    model = plain(net, torch.tanh)
    simulator = pcsim.Simulator(
        net, pcsim.Relaxation(steps, rate, precision=schedule), pcsim.IncrementalUpdate(), engine=engine
    )
    optimizer = optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    velocity = [torch.zeros_like(parameter) for parameter in model.parameters]
    for x, y in batches:
        simulator.update({"input": x, "output": y}, optimizer)
        hidden = [value.detach().requires_grad_() for value in model.forward(x)[1:-1]]
        for step in range(steps):
            scales = [0.8] * 3 if isinstance(schedule, pcsim.Constant) else spiking(step, 3, 0.1, 1.5)
            energy = model.total([x, *hidden, y], scales)
            of_hidden = torch.autograd.grad(energy, hidden, retain_graph=True)
            of_weights = torch.autograd.grad(energy, model.parameters)
            with torch.no_grad():
                for value, gradient in zip(hidden, of_hidden, strict=True):
                    value -= rate * gradient
                for place, gradient in enumerate(of_weights):
                    # Before the error arrives a parameter is left alone, by the momentum of the last batch too.
                    if step < 2 - place // 2:
                        assert float(gradient.abs().max()) < 1e-14
                        continue
                    parameter, moved = model.parameters[place], velocity[place]
                    moved.mul_(momentum).add_(gradient / 4)
                    parameter -= lr * moved
        for name, expected in zip(("hidden1", "hidden2"), hidden, strict=True):
            assert_close(net[name].value, expected.detach())
        for linear, weight, bias in zip(linears(net), model.weights, model.biases, strict=True):
            assert_close(linear.weight.detach(), weight.detach())
            assert_close(linear.bias.detach(), bias.detach())


# Starting from the previous values


def test_previous_start_continues_on_a_cycle(engine: str) -> None:
    net, clamps = linear_cycle()
    net.double()
    halves = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1, start="previous"), engine=engine)
    halves.infer(clamps)
    first = read(net)
    halves.infer(clamps)
    second = read(net)
    pcsim.Simulator(net, pcsim.Relaxation(8, 0.1), engine=engine).infer(clamps)
    for got, expected in zip(second, read(net), strict=True):
        assert_close(got, expected, 1e-14)
    zeros = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1), engine=engine)
    for _ in range(2):
        zeros.infer(clamps)
        assert not net["a"].forward_value.any()
    for before, again, after in zip(first, read(net), second, strict=True):
        assert_close(again, before, 1e-14)
        assert before is first[0] or before is first[-1] or not torch.allclose(before, after, atol=1e-3)


def test_previous_start_of_another_batch_size_is_zeros(engine: str) -> None:
    net, clamps = linear_cycle()
    net.double()
    fewer = {name: value[:2] for name, value in clamps.items()}
    simulator = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1, start="previous"), engine=engine)
    simulator.infer(clamps)
    simulator.infer(fewer)
    got = read(net)
    pcsim.Simulator(net, pcsim.Relaxation(4, 0.1), engine=engine).infer(fewer)
    for value, expected in zip(got, read(net), strict=True):
        assert_close(value, expected, 1e-14)
