"""Any device: no tensor is made elsewhere, and what is read from the device is one number a batch; without a GPU.

On PyTorch's meta device tensors have shapes and no numbers, so that whatever reads one, or mixes devices, is met. What
is marked ``device`` runs on the device that ``--device`` names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import pcsim
from pcsim import clamps as given
from pcsim.errors import ClampError, DivergenceError

SEEDS = ("aten::randint", "aten::random_", "aten::empty")
"""What may be made on the CPU: seeds of random draws, which start there."""


class Watched(TorchDispatchMode):
    """Counts what is read from a device, and refuses tensors that are made on another."""

    anywhere = False

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.reads = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == self.device.type:
            self.reads += 1
            if self.device.type == "meta":
                return 0.0 if args[0].is_floating_point() else False if args[0].dtype == torch.bool else 0
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and tensor.device.type != self.device.type and not self.anywhere:
                assert func.name().split(".")[0] in SEEDS, f"{func} made {tuple(tensor.shape)} on {tensor.device}"
        return made


class CountedOnly(Watched):
    """Counts reads, and lets tensors be made anywhere."""

    anywhere = True


def chain() -> pcsim.Network:
    return pcsim.topologies.mlp([6, 8, 8, 3])


def cyclic() -> pcsim.Network:
    """A cycle, a self-loop, a prior, a product, parallel edges and equal ones, which are stacked."""
    net = pcsim.Network()
    net.add_node("input", (6,))
    for name in ("a", "b"):
        net.add_node(name, (8,), transfer=nn.Tanh())
    net.add_node("cause", (8,), prior=0.5)
    net.add_node("product", (8,), combine=pcsim.Product())
    net.add_node("output", (3,))
    for source, target in (("a", "b"), ("b", "a"), ("a", "a"), ("a", "b"), ("cause", "a")):
        net.add_edge(source, target, nn.Linear(8, 8), gain=0.1)
    net.add_edge("input", "a", nn.Linear(6, 8))
    net.add_edge("a", "product")
    net.add_edge("b", "product")
    net.add_edge("product", "output", nn.Linear(8, 3))
    return net


def images(*middle: nn.Module) -> pcsim.Network:
    """Convolutions, and what stands between them."""
    net = pcsim.Network()
    net.add_node("input", (3, 8, 8))
    net.add_node("first", (4, 4, 4), transfer=nn.Sequential(*middle, nn.ReLU(), nn.MaxPool2d(2)))
    net.add_node("output", (3,))
    net.add_edge("input", "first", nn.Conv2d(3, 4, 3, padding=1))
    net.add_edge("first", "output", nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    return net


def with_transfer(make: Callable[[], nn.Module]) -> Callable[[], pcsim.Network]:
    """A chain with one module as a transfer and on an edge."""

    def build() -> pcsim.Network:
        net = pcsim.Network()
        net.add_node("input", (6,))
        net.add_node("hidden", (8,), transfer=make())
        net.add_node("output", (3,))
        net.add_edge("input", "hidden", nn.Linear(6, 8))
        net.add_edge("hidden", "output", nn.Sequential(make(), nn.Linear(8, 3)))
        return net

    return build


def energies() -> pcsim.Network:
    """Every energy, and a learned precision."""
    net = pcsim.Network()
    net.add_node("input", (6,))
    kinds = [pcsim.Laplace(), pcsim.Huber(), pcsim.StudentT(), pcsim.CorrelatedGaussian(torch.eye(8)), None]
    previous = "input"
    for place, energy in enumerate(kinds):
        own = pcsim.LearnedPrecision() if energy is None else 1.0
        net.add_node(f"hidden{place}", (8,), energy=energy, precision=own)
        net.add_edge(previous, f"hidden{place}", nn.Linear(6 if place == 0 else 8, 8))
        previous = f"hidden{place}"
    net.add_node("output", (3,), energy=pcsim.CrossEntropy())
    net.add_edge(previous, "output", nn.Linear(8, 3))
    return net


def tokens() -> pcsim.Network:
    """A node of integers."""
    net = pcsim.Network()
    net.add_node("input", (6,))
    net.add_node("hidden", (8,), transfer=nn.Tanh())
    net.add_node("output", (3,))
    net.add_edge("input", "hidden", nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 8)))
    net.add_edge("hidden", "output", nn.Linear(8, 3))
    return net


def attention() -> pcsim.Network:
    return pcsim.topologies.transformer(image=(1, 4, 4), patch=2, classes=3, width=4, heads=2, blocks=1)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky": nn.LeakyReLU,
    "layer norm": lambda: nn.LayerNorm(8),
    "batch norm": lambda: nn.BatchNorm1d(8),
    "dropout": lambda: nn.Dropout(0.5),
    "softplus, by autograd": nn.Softplus,
    "bilinear, by autograd": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Flatten()),
}
NETWORKS: dict[str, Callable[[], pcsim.Network]] = {
    "chain": chain,
    "cyclic": cyclic,
    "images": images,
    "images, normalised": lambda: images(nn.BatchNorm2d(4)),
    "energies": energies,
    "tokens": tokens,
    "attention": attention,
    "residual": lambda: pcsim.topologies.residual_mlp(6, 8, 3, blocks=2),
    "balanced": lambda: pcsim.balance_paths(pcsim.topologies.residual_mlp(6, 8, 3, blocks=2), 0.5),
    "vgg": lambda: pcsim.topologies.vgg("VGG5", image=(3, 32, 32), classes=3, width=1 / 32, batch_norm=True),
    "resnet": lambda: pcsim.topologies.resnet("ResNet10", image=(3, 8, 8), classes=3, width=1 / 16, batch_norm=True),
    **{name: with_transfer(make) for name, make in MODULES.items()},
}
SPIKING, STEPS = pcsim.Spiking(alpha=0.0), 14
RULES: dict[str, tuple[pcsim.Relaxation, pcsim.LearningRule]] = {
    "settled": (pcsim.Relaxation(STEPS, 0.5), pcsim.SettledUpdate()),
    "forward": (pcsim.Relaxation(STEPS, 0.5, precision=SPIKING), pcsim.ForwardUpdate()),
    "incremental": (pcsim.Relaxation(STEPS, 0.5), pcsim.IncrementalUpdate()),
    "backprop": (pcsim.Relaxation(STEPS, 0.5), pcsim.Backprop()),
}
RELAXATIONS: dict[str, tuple[pcsim.Relaxation, pcsim.LearningRule]] = {
    "arrival": (pcsim.Relaxation(STEPS, 0.5, precision=pcsim.Spiking.for_rate(0.5)), pcsim.ArrivalUpdate()),
    "decaying": (pcsim.Relaxation(STEPS, 0.5, precision=pcsim.Decaying()), pcsim.ForwardUpdate()),
    "momentum": (pcsim.Relaxation(STEPS, 0.5, momentum=0.5, nesterov=True), pcsim.SettledUpdate()),
    "held": (pcsim.Relaxation(STEPS, 0.5, hold_predictions=True), pcsim.SettledUpdate()),
    "sampling": (pcsim.Relaxation(STEPS, 0.5, temperature=0.1), pcsim.SettledUpdate()),
    "multipliers": (pcsim.Relaxation(STEPS, 0.5, multipliers=0.1), pcsim.SettledUpdate()),
    "previous": (pcsim.Relaxation(STEPS, 0.5, start="previous"), pcsim.SettledUpdate()),
    "errors": (pcsim.ErrorRelaxation(STEPS, 0.5), pcsim.SettledUpdate()),
}
CASES = [
    *((network, rule) for network in NETWORKS for rule in RULES if (network, rule) != ("cyclic", "backprop")),
    *(("chain", relaxation) for relaxation in RELAXATIONS),
]
DEEP = [
    ("attention", "incremental"),
    *((network, rule) for network in ("vgg", "resnet") for rule in RULES if rule != "forward"),
]
"""Those that take seconds."""
NO_GENERATOR = ("chain", "sampling")
"""Draws numbers on the device, for which the meta device has no generator."""
COMPILED_AFTER = 2
"""Batches of a kind; the first two each compile a program, for which shapes are probed and indices brought over."""


def batch_of(net: pcsim.Network, device: str | torch.device, size: int = 4) -> dict[str, Tensor]:
    """Inputs and one-hot targets."""
    generator = torch.Generator().manual_seed(1)
    shape, count = (size, *net["input"].shape), net["input"].integers
    draw = torch.randn if count is None else partial(torch.randint, count)
    inputs = draw(size=shape, generator=generator)
    return {"input": inputs.to(device), "output": torch.eye(3)[torch.arange(size) % 3].to(device)}


@pytest.mark.filterwarnings("ignore::pcsim.PCWarning")
@pytest.mark.parametrize(
    ("network", "rule"),
    [pytest.param(*c, marks=pytest.mark.slow if c in DEEP else ()) for c in CASES if c != NO_GENERATOR],
)
def test_everything_stays_on_the_device_and_one_number_is_read(network: str, rule: str) -> None:
    net, (relaxation, learns) = NETWORKS[network]().to("meta"), {**RULES, **RELAXATIONS}[rule]
    clamps, device = batch_of(net, "meta"), torch.device("meta")
    sim = pcsim.Simulator(net, relaxation, learns)
    optimizer = SGD(net.parameters(), lr=0.1)
    for number in range(COMPILED_AFTER + 1):
        if number < COMPILED_AFTER:
            with CountedOnly(device) as watched:
                sim.update(clamps, optimizer)
        else:
            with Watched(device) as watched:
                sim.update(clamps, optimizer)
        assert watched.reads <= 1 or (number < COMPILED_AFTER and rule == "errors")
    if not learns.every_step:
        with Watched(device) as watched:
            sim.infer(clamps)
            sim.learn(optimizer)
        assert watched.reads <= 1
    for make in (CountedOnly, CountedOnly, Watched):
        with make(device) as watched:
            output = sim.predict({"input": clamps["input"]})["output"]
        assert watched.reads <= (2 if network == "cyclic" else 1)  # where predicting is a relaxation of its own
    assert output.device == device


@pytest.mark.parametrize("rule", ["settled", "incremental"])
def test_recording_stays_on_the_device(rule: str) -> None:
    net, (relaxation, learns) = chain().to("meta"), RULES[rule]
    sim, clamps = pcsim.Simulator(net, relaxation, learns), batch_of(net, "meta")
    with Watched(torch.device("meta")) as watched:
        trace = sim.update(clamps, SGD(net.parameters(), lr=0.1), record=True)
    assert watched.reads == 1
    assert trace.energies is not None
    assert trace.energies.device.type == "meta"


def test_what_has_to_be_looked_at_at_every_step() -> None:
    """A tolerance, and rates of their own, decide on the host what is done next."""
    for relaxation in (pcsim.Relaxation(4, 0.5, tolerance=0.1), pcsim.Relaxation(4, 0.5, least_rate=0.1)):
        net = chain().to("meta")
        clamps = batch_of(net, "meta")
        with CountedOnly(torch.device("meta")) as watched:
            pcsim.Simulator(net, relaxation).infer(clamps)
        assert watched.reads > 1


# The same where numbers are


@pytest.fixture
def reads_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if reading from the CPU had to wait."""
    monkeypatch.setattr(given, "reads_freely", lambda device: False)


def state_of(sim: pcsim.Simulator, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a failed call must leave."""
    shown = {f"value of {name}": node.value for name, node in sim.network.nodes.items()}
    return {**sim.network.state_dict(), **shown, "optimizer": copy.deepcopy(optimizer.state_dict())}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return bool(first == second)


def spoiled(net: pcsim.Network, kind: str) -> dict[str, Any]:
    clamps: dict[str, Any] = batch_of(net, "cpu")
    bad = clamps["input"].clone()
    bad[1, 2] = torch.nan if kind.startswith("nan") else -torch.inf
    unknown = torch.ones_like(bad, dtype=torch.bool)
    unknown[2 if kind.endswith("masked") else 1, 2] = False
    if "masked" in kind or "unknown" in kind:
        return {**clamps, "input": (bad, unknown)}
    if kind.endswith("target"):
        return {**clamps, "output": clamps["output"] * torch.nan}
    if kind == "large":
        return {**clamps, "input": torch.full_like(bad, 1e38)}  # finite, with a sum that is not
    return {**clamps, "input": bad}


def outcome(kind: str, rule: str, engine: str = "batched") -> tuple[str, str, bool]:
    """What a batch raises after a good one, and whether everything stayed as it was."""
    torch.manual_seed(0)
    net, (relaxation, learns) = chain(), RULES[rule]
    if kind == "large":
        with torch.no_grad():
            next(net.parameters()).zero_()
    sim, optimizer = pcsim.Simulator(net, relaxation, learns, engine=engine), AdamW(net.parameters())
    sim.update(batch_of(net, "cpu"), optimizer)
    before = copy.deepcopy(state_of(sim, optimizer))
    try:
        if kind == "divergence":
            sim.relaxation = pcsim.Relaxation(60, 1e3)
            sim.update(batch_of(net, "cpu"), optimizer)
        else:
            sim.update(spoiled(net, kind), optimizer)
    except pcsim.PCError as error:
        return type(error).__name__, str(error), same(state_of(sim, optimizer), before)
    return "", "", True


KINDS = ("nan", "infinite", "nan target", "nan, masked", "nan, unknown", "large", "divergence")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_late_is_refused_in_the_same_words(kind: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = outcome(kind, rule)
    monkeypatch.setattr(given, "reads_freely", lambda device: False)
    late = outcome(kind, rule)
    if "," in kind and rule == "backprop":  # which takes no mask, whatever is in it
        assert late[0] == at_once[0] == "ClampError"
        return
    assert late == at_once
    assert at_once[2]
    refused = kind not in ("nan, unknown", "large", "divergence")
    assert (at_once[0] == "ClampError") == refused
    if kind == "divergence" and rule != "backprop":
        assert at_once[0] == "DivergenceError"


def test_the_reference_engine_reads_at_once(reads_late: None) -> None:
    assert outcome("nan", "settled", engine="reference")[0] == "ClampError"
    assert outcome("nan, unknown", "settled", engine="reference")[0] == ""


def test_where_nodes_start_is_read_with_the_rest(reads_late: None) -> None:
    net = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.5))
    hidden = torch.zeros(4, 8)
    with Watched(torch.device("cpu")) as watched:
        sim.infer(batch_of(net, "cpu"), init={"hidden1": hidden})
    assert watched.reads == 1
    before = net["hidden2"].value
    with pytest.raises(ClampError, match="init 'hidden1': holds NaN or infinity"):
        sim.infer(batch_of(net, "cpu"), init={"hidden1": hidden + torch.nan})
    assert torch.equal(net["hidden2"].value, before)
    with pytest.raises(ClampError, match="clamp 'input': holds NaN"):
        sim.infer(spoiled(net, "nan"), init={"hidden1": hidden})


def test_values_that_are_not_given_are_the_same(reads_late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A masked clamp is put right on the device as it is on the CPU."""
    values = []
    for late in (True, False):
        monkeypatch.setattr(given, "reads_freely", lambda device, late=late: not late)
        torch.manual_seed(0)
        net = chain()
        pcsim.Simulator(net, pcsim.Relaxation(3, 0.5)).infer(spoiled(net, "nan, unknown"))
        values.append([node.value for node in net.nodes.values()])
    assert all(torch.equal(one, other) for one, other in zip(*values, strict=True))


# On the device that --device names


@pytest.mark.device
@pytest.mark.filterwarnings("ignore::pcsim.PCWarning")
@pytest.mark.parametrize(
    ("network", "rule"), [case for case in CASES if case[1] != "sampling" and case[0] != "dropout"]
)
def test_the_device_computes_what_the_reference_does_on_the_cpu(network: str, rule: str, device: torch.device) -> None:
    if network == "cyclic" and rule == "incremental":
        pytest.skip("weights that move fourteen times a batch amplify rounding there")
    found = []
    for place, engine in (("cpu", "reference"), (device, "batched")):
        torch.manual_seed(0)
        net, (relaxation, learns) = NETWORKS[network]().double().to(place), {**RULES, **RELAXATIONS}[rule]
        items = batch_of(net, place).items()
        clamps = {name: value.double() if value.is_floating_point() else value for name, value in items}
        sim = pcsim.Simulator(net, relaxation, learns, engine=engine)
        sim.update(clamps, SGD(net.parameters(), lr=0.01))
        found.append({**{name: node.value.cpu() for name, node in net.nodes.items()},
                      **{name: tensor.cpu() for name, tensor in net.state_dict().items()}})  # fmt: skip
    for name, expected in found[0].items():
        torch.testing.assert_close(
            found[1][name], expected, rtol=1e-7, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.device
def test_a_trainer_trains_there_and_goes_on(device: torch.device, tmp_path: Any) -> None:
    train, _ = pcsim.data.digits()
    loader = DataLoader(TensorDataset(train.images[:512], train.labels[:512]), 64, shuffle=True)

    def made() -> pcsim.Trainer:
        torch.manual_seed(0)
        net = pcsim.topologies.mlp([64, 32, 32, 10]).to(device)
        sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.5, precision=SPIKING), pcsim.ForwardUpdate())
        path = tmp_path / "run"
        return pcsim.Trainer(
            sim, AdamW(net.parameters(), lr=3e-3), callbacks=[pcsim.Checkpoint(path)], seed=0, progress=False
        )

    whole, resumed = made(), made()
    whole.fit(loader, epochs=4, validation=loader)
    assert whole.history.of("accuracy", "validation")[-1] > 0.7
    made().fit(loader, epochs=2, validation=loader)
    resumed.load_checkpoint(tmp_path / "run")
    resumed.fit(loader, epochs=2, validation=loader)
    pairs = zip(whole.simulator.network.parameters(), resumed.simulator.network.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


@pytest.mark.device
@pytest.mark.parametrize("start", ["there", "here"])
def test_a_checkpoint_goes_on_on_another_device(start: str, device: torch.device, tmp_path: Any) -> None:
    train, _ = pcsim.data.digits()
    loader = DataLoader(TensorDataset(train.images[:128].double(), train.labels[:128]), 32, shuffle=True)

    def made(place: torch.device, folder: str) -> pcsim.Trainer:
        torch.manual_seed(0)
        net = pcsim.topologies.mlp([64, 16, 10]).double().to(place)
        sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.5, precision=SPIKING), pcsim.ForwardUpdate())
        callbacks = [pcsim.Checkpoint(tmp_path / folder)]
        return pcsim.Trainer(sim, AdamW(net.parameters(), lr=3e-3), callbacks=callbacks, seed=0, progress=False)

    here = torch.device("cpu")
    first, second = (device, here) if start == "there" else (here, device)
    whole, resumed = made(second, "whole"), made(second, "resumed")
    whole.fit(loader, epochs=2)
    made(first, "first").fit(loader, epochs=1)
    resumed.load_checkpoint(tmp_path / "first")
    resumed.fit(loader, epochs=1)
    weights = [dict(trainer.simulator.network.named_parameters()) for trainer in (whole, resumed)]
    for name, weight in weights[0].items():
        assert weights[1][name].device.type == second.type
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-6, atol=1e-8)
        moments = resumed.optimizer.state[weights[1][name]]
        assert moments["exp_avg"].device.type == second.type


@pytest.mark.device
@pytest.mark.parametrize("rule", RULES)
def test_one_number_is_read_there(rule: str, device: torch.device, reads_late: None) -> None:
    net, (relaxation, learns) = chain().to(device), RULES[rule]
    sim, clamps = pcsim.Simulator(net, relaxation, learns), batch_of(net, device)
    optimizer = SGD(net.parameters(), lr=0.01)
    for _ in range(COMPILED_AFTER):
        sim.update(clamps, optimizer)
    with Watched(device) as watched:
        sim.update(clamps, optimizer)
    assert watched.reads == 1


@pytest.mark.device
@pytest.mark.parametrize("rule", RULES)
def test_failures_there_are_named_and_leave_everything(device: torch.device, rule: str) -> None:
    torch.manual_seed(0)
    net, (relaxation, learns) = chain().to(device), RULES[rule]
    sim, optimizer = pcsim.Simulator(net, relaxation, learns), AdamW(net.parameters())
    clamps = batch_of(net, device)
    sim.update(clamps, optimizer)
    before = copy.deepcopy(state_of(sim, optimizer))
    with pytest.raises(ClampError, match="clamp 'input': holds NaN or infinity"):
        sim.update({**clamps, "input": clamps["input"] * torch.nan}, optimizer)
    if rule != "backprop":
        sim.relaxation = pcsim.Relaxation(60, 1e3)
        with pytest.raises(DivergenceError, match="at inference step"):
            sim.update(clamps, optimizer)
    assert same(state_of(sim, optimizer), before)
