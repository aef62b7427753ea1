"""The trainer: it fits, it repeats, it tells callbacks what happens, and it refuses what cannot work."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from conftest import Noisy, generators
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pcsim
from pcsim.callbacks import BatchRecord, Callback, EpochRecord, History
from pcsim.errors import ClampError, DivergenceError, EnergyWarning, PCError, SettingError
from pcsim.metrics import Accuracy, ErrorByLevel, Metric, Outcome, RelaxedEnergy
from pcsim.training import Trainer

Batch = tuple[Tensor, Tensor]
FREE_OF_CHARGE = (Accuracy(),)


def simulator(
    *, rule: pcsim.LearningRule | None = None, rate: float = 0.2, engine: str = "batched", classes: int = 10
) -> pcsim.Simulator:
    """A chain of three edges with the same weights every time."""
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([64, 32, 32, classes])
    return pcsim.Simulator(net, pcsim.Relaxation(steps=4, rate=rate), rule, engine=engine)


def trainer(sim: pcsim.Simulator | None = None, **options: Any) -> Trainer:
    """A silent trainer with AdamW."""
    sim = simulator() if sim is None else sim
    optimizer = options.pop("optimizer", None) or AdamW(sim.network.parameters(), lr=3e-3)
    return Trainer(sim, optimizer, **{"progress": False, **options})


def noise(batches: int = 3, size: int = 8, *, classes: int = 10) -> list[Batch]:
    """Batches of random images and one-hot targets, the last one smaller."""
    generator = torch.Generator().manual_seed(1)
    sizes = [size] * (batches - 1) + [size // 2]
    return [
        (
            torch.rand(count, 64, generator=generator),
            torch.eye(classes)[torch.randint(classes, (count,), generator=generator)],
        )
        for count in sizes
    ]


def weights(sim: pcsim.Simulator) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in sim.network.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rule", [pcsim.SettledUpdate(), pcsim.ForwardUpdate(), pcsim.IncrementalUpdate()])
def test_digits_are_learned(rule: pcsim.LearningRule) -> None:
    train, test = pcsim.data.digits()
    own = trainer(simulator(rule=rule), seed=0)
    history = own.fit(
        DataLoader(train.dataset(), 64, shuffle=True), epochs=6, validation=DataLoader(test.dataset(), 120)
    )
    accuracies = history.of("accuracy", "validation")
    assert accuracies[-1] > 0.88
    assert history.of("accuracy")[-1] > history.of("accuracy")[0]
    assert history.of("energy")[-1] < history.of("energy")[0]
    assert [record.epoch for record in history.records] == list(range(1, 7))
    assert all(record.seconds > 0 for record in history.records)
    clean = DataLoader(test.dataset(), 360)
    assert own.evaluate(clean)["accuracy"] == pytest.approx(accuracies[-1])


def test_accuracy_and_energy_are_those_of_the_simulator() -> None:
    own, batches = trainer(relaxed_every=1), noise()
    found = own.evaluate(batches)
    sim, right, energy, count = own.simulator, 0, 0.0, 0
    for images, targets in batches:
        right += int((sim.predict({"input": images})["output"].argmax(1) == targets.argmax(1)).sum())
        sim.infer({"input": images, "output": targets})
        energy += float(sum(energies.sum() for energies in sim.energy().values()))
        count += len(images)
    assert found == {"energy": pytest.approx(energy / count), "accuracy": pytest.approx(right / count)}


def test_energy_counts_a_node_by_its_weight() -> None:
    net = pcsim.Network()
    net.add_node("input", (2,))
    net.add_node("output", (1,), energy_weight=3.0)
    net.add_edge("input", "output", nn.Linear(2, 1))
    sim = pcsim.Simulator(net, pcsim.Relaxation(1))
    sim.infer({"input": torch.ones(4, 2), "output": torch.zeros(4, 1)})
    measured = RelaxedEnergy().measure(Outcome(net, None, None, None))
    assert measured["energy"].item() == pytest.approx(3 * net["output"].energy.mean().item())


def test_errors_by_level() -> None:
    own = trainer(metrics=[ErrorByLevel()])
    found = own.evaluate(noise()[:1])
    net = own.simulator.network
    assert found == {
        f"error_level_{level}": pytest.approx(net[name].error.norm(dim=1).mean().item())
        for level, name in enumerate(("output", "hidden2", "hidden1"))
    }


def test_relaxed_metrics_are_measured_as_often_as_asked() -> None:
    measured: list[set[str]] = []

    class Listener(Callback):
        def on_batch_end(self, trainer: Trainer, record: BatchRecord) -> None:
            measured.append(set(record.metrics))

    trainer(relaxed_every=2, callbacks=[Listener()]).fit(noise(3), epochs=1)
    assert measured == [{"accuracy", "energy"}, {"accuracy"}, {"accuracy", "energy"}]


def test_means_count_samples_not_batches() -> None:
    class First(Metric):
        def measure(self, outcome: Outcome) -> Mapping[str, Tensor]:
            assert outcome.target is not None
            return {"first": outcome.target[:, 0].mean()}

    batches = [(torch.zeros(3, 64), torch.ones(3, 10)), (torch.zeros(1, 64), torch.zeros(1, 10))]
    assert trainer(metrics=[First()]).evaluate(batches) == {"first": 0.75}


@pytest.mark.parametrize("generator", [None, torch.Generator()])
@pytest.mark.parametrize("rule", [pcsim.SettledUpdate(), pcsim.IncrementalUpdate()])
def test_seeded_runs_are_equal_bit_for_bit(rule: pcsim.LearningRule, generator: torch.Generator | None) -> None:
    pairs = TensorDataset(*(torch.cat(parts) for parts in zip(*noise(5), strict=True)))
    loader = DataLoader(pairs, 8, shuffle=True, generator=generator)
    runs, histories = [], []
    for _ in range(2):
        own = trainer(simulator(rule=rule), seed=3)
        torch.rand(5)  # wherever the generators stand, the seed decides
        histories.append(own.fit(loader, epochs=2, validation=noise(2)))
        runs.append(weights(own.simulator))
    assert same(*runs)
    assert histories[0].of("energy") == histories[1].of("energy")
    other = trainer(simulator(rule=rule), seed=4)
    other.fit(loader, epochs=2)
    assert not same(runs[0], weights(other.simulator))


def test_validation_changes_nothing_about_the_training() -> None:
    pairs = TensorDataset(*(torch.cat(parts) for parts in zip(*noise(5), strict=True)))
    results = []
    for validation in (None, DataLoader(pairs, 8, shuffle=True)):
        own = trainer(dropout_simulator(), seed=3)
        own.fit(DataLoader(pairs, 8, shuffle=True), epochs=2, validation=validation)
        results.append(weights(own.simulator))
    assert same(*results)


def dropout_simulator() -> pcsim.Simulator:
    """A chain with dropout and batch normalisation."""
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("input", (64,))
    net.add_node("hidden", (32,), transfer=nn.Sequential(nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.2)))
    net.add_node("output", (10,))
    net.add_edge("input", "hidden", nn.Linear(64, 32))
    net.add_edge("hidden", "output", nn.Linear(32, 10))
    return pcsim.Simulator(net, pcsim.Relaxation(steps=3, rate=0.2))


def test_evaluation_leaves_weights_statistics_modes_and_random_state() -> None:
    own = trainer(dropout_simulator())
    network = own.simulator.network
    network["hidden"].transfer[2].eval()
    own.fit(noise(), epochs=1)
    before, modes = weights(own.simulator), [module.training for module in network.modules()]
    state = torch.get_rng_state()
    first = own.evaluate(noise(2))
    assert same(before, weights(own.simulator))
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert own.evaluate(noise(2)) == first


def test_evaluation_leaves_every_generator() -> None:
    sim = simulator()
    sim.network["hidden1"].transfer = nn.Sequential(Noisy(32), nn.Tanh())
    own = trainer(sim)
    state = generators()
    own.evaluate(DataLoader(TensorDataset(*noise(1)[0]), 2, shuffle=True))
    assert generators() == state


@pytest.mark.parametrize(("per", "expected"), [("epoch", [0.1, 0.01]), ("batch", [1e-3, 1e-6])])
def test_scheduler_steps(per: str, expected: list[float]) -> None:
    sim = simulator()
    optimizer = SGD(sim.network.parameters(), lr=0.1)
    own = trainer(sim, optimizer=optimizer, scheduler=StepLR(optimizer, 1, gamma=0.1), schedule_per=per)
    history = own.fit(noise(3), epochs=2)
    assert [record.learning_rate for record in history.records] == pytest.approx(expected)


def test_plateau_scheduler_watches_a_metric() -> None:
    class Stuck(Metric):
        def measure(self, outcome: Outcome) -> Mapping[str, Tensor]:
            return {"stuck": torch.ones(())}

    sim = simulator()
    optimizer = SGD(sim.network.parameters(), lr=0.1)
    plateau = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    own = trainer(sim, optimizer=optimizer, scheduler=plateau, monitor="stuck", metrics=[Stuck()])
    history = own.fit(noise(1), epochs=3, validation=noise(1))
    assert [record.learning_rate for record in history.records] == [0.1, 0.1, 0.05]
    own.monitor = "accuracy"
    with pytest.raises(SettingError, match="'accuracy' given, but 'stuck' was measured"):
        own.fit(noise(1), epochs=1)


class Diary(Callback):
    """Writes down who was called when, and stops where it is told to."""

    def __init__(self, name: str, diary: list[str], stop: str = "") -> None:
        self.name, self.diary, self.stop = name, diary, stop

    def write(self, trainer: Trainer, entry: str) -> None:
        self.diary.append(f"{self.name} {entry}")
        if entry == self.stop:
            trainer.stop()

    def on_fit_start(self, trainer: Trainer) -> None:
        self.write(trainer, "start")

    def on_batch_end(self, trainer: Trainer, record: BatchRecord) -> None:
        assert record.trace.steps == 4
        self.write(trainer, f"batch {record.epoch}.{record.batch}")

    def on_epoch_end(self, trainer: Trainer, record: EpochRecord) -> None:
        assert trainer.history.records[-1] is record
        self.write(trainer, f"epoch {record.epoch}")

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        self.write(trainer, f"end {len(history.records)}")


def test_callbacks_are_called_in_order() -> None:
    diary: list[str] = []
    trainer(callbacks=[Diary("a", diary), Diary("b", diary)]).fit(noise(2), epochs=2)
    entries = ["start", "batch 1.0", "batch 1.1", "epoch 1", "batch 2.0", "batch 2.1", "epoch 2", "end 2"]
    assert diary == [f"{name} {entry}" for entry in entries for name in "ab"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("batch 1.0", ["start", "batch 1.0", "epoch 1", "end 1"]),
        ("epoch 1", ["start", "batch 1.0", "batch 1.1", "epoch 1", "end 1"]),
    ],
)
def test_a_callback_can_stop(stop: str, expected: list[str]) -> None:
    diary: list[str] = []
    own = trainer(callbacks=[Diary("a", diary, stop)])
    own.fit(noise(2), epochs=5)
    assert diary == [f"a {entry}" for entry in expected]
    diary.clear()
    own.callbacks = (Diary("a", diary),)
    own.fit(noise(1), epochs=1)
    assert diary == ["a start", "a batch 2.0", "a epoch 2", "a end 2"]


def test_a_stop_before_the_first_batch_is_heard() -> None:
    diary: list[str] = []
    history = trainer(callbacks=[Diary("a", diary, "start")]).fit(noise(2), epochs=5)
    assert diary == ["a start", "a end 0"]
    assert history.records == []


def test_the_end_is_told_after_an_exception() -> None:
    diary: list[str] = []
    with pytest.raises(ClampError):
        trainer(callbacks=[Diary("a", diary)]).fit([(torch.zeros(2, 3), torch.zeros(2, 10))], epochs=1)
    assert diary == ["a start", "a end 0"]


def test_class_numbers_become_one_hot() -> None:
    results = []
    for turn in (lambda targets: targets, lambda targets: targets.argmax(1)):
        own = trainer()
        own.fit([(images, turn(targets)) for images, targets in noise()], epochs=1)
        results.append(weights(own.simulator))
    assert same(*results)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_class_numbers_of_any_integer_type(dtype: torch.dtype) -> None:
    own = trainer(metrics=FREE_OF_CHARGE)
    own.fit([(noise()[0][0], torch.arange(8).to(dtype))], epochs=1)
    assert torch.equal(own.simulator.network["output"].value, torch.eye(10)[:8])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(10,), (1,), ()])
def test_targets_of_the_shape_of_their_node_are_values(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    net = pcsim.Network()
    net.add_node("input", (64,))
    net.add_node("output", shape)
    layers = [nn.Linear(64, 10), nn.Linear(64, 1), nn.Sequential(nn.Linear(64, 1), nn.Flatten(0))]
    net.add_edge("input", "output", layers[[(10,), (1,), ()].index(shape)])
    targets = (torch.arange(8.0).view(8, *[1] * len(shape)).expand(8, *shape) % 3).to(dtype)
    own = trainer(pcsim.Simulator(net, pcsim.Relaxation(1, 0.1)))
    history = own.fit([(noise()[0][0], targets)], epochs=1)
    assert torch.equal(net["output"].value, targets.float())
    assert history.records[0].train.keys() == {"energy"}  # no class is told from another by such values


def vision(shape: tuple[int, ...]) -> pcsim.Simulator:
    """An edge into an output of any shape."""
    net = pcsim.Network()
    net.add_node("input", (64,))
    net.add_node("output", shape, energy=pcsim.CrossEntropy() if shape == (3,) else None)
    net.add_edge("input", "output", nn.Sequential(nn.Linear(64, math.prod(shape)), nn.Unflatten(1, shape)))
    return pcsim.Simulator(net, pcsim.Relaxation(1, 0.1))


ZEROS, EIGHT = torch.zeros(8), torch.arange(8)


@pytest.mark.parametrize(
    ("shape", "targets", "message"),
    [
        (
            (1,),
            ZEROS.long(),
            r"\(8,\) and torch.int64 given, expected \(batch, 1\) for node 'output'.*unsqueeze\(1\)",
        ),
        ((1,), EIGHT, r"expected \(batch, 1\) for node.*if they are classes, give the node a unit for each"),
        ((1,), ZEROS.bool(), r"torch.bool given, expected \(batch, 1\).*targets.unsqueeze\(1\)"),
        ((1,), ZEROS, r"torch.float32 given, expected \(batch, 1\).*targets.unsqueeze\(1\)"),
        ((1,), torch.zeros(8, 1, 1), r"take away the axis that is too many, targets.squeeze\(1\)"),
        ((3,), EIGHT, "targets from 0 to 7 given, expected class numbers from 0 to 2"),
        ((3,), EIGHT - 100, "targets from -100 to -93 given, expected class numbers from 0 to 2"),
        ((3,), ZEROS.bool(), r"torch.bool given, expected \(batch, 3\), or class numbers.*targets.long\(\)"),
        ((3,), ZEROS, r"torch.float32 given, expected \(batch, 3\), or class numbers.*targets.long\(\)"),
        ((3,), ZEROS[:, None].long(), r"if they are class numbers, give targets.squeeze\(1\)$"),
        ((3,), ZEROS[:, None], r"if they are class numbers, give targets.squeeze\(1\).long\(\)"),
        ((3,), torch.zeros(8, 4).long(), "the batch is the first axis"),
        ((2, 2), ZEROS.long(), r"expected \(batch, 2, 2\) for node"),
        ((2, 1), torch.zeros(8, 2), r"targets.unsqueeze\(2\)$"),
        ((3, 2, 2), torch.zeros(8, 2, 2).long(), r"one_hot\(targets, 3\).movedim\(-1, 1\)"),
    ],
)
def test_targets_that_are_neither_values_nor_classes_are_refused(
    shape: tuple[int, ...], targets: Tensor, message: str
) -> None:
    own = trainer(vision(shape))
    before = weights(own.simulator)
    for call in (lambda batches: own.fit(batches, epochs=1), own.evaluate):
        with pytest.raises((ClampError, SettingError), match=message):
            call([(noise()[0][0], targets)])
    assert same(before, weights(own.simulator))


def test_accuracy_needs_outputs_of_which_one_is_largest() -> None:
    own = trainer(vision((1,)), metrics=FREE_OF_CHARGE)
    with pytest.raises(SettingError, match=r"Accuracy: outputs of shape \(8, 1\) given, expected two units or more"):
        own.evaluate([(noise()[0][0], torch.zeros(8, 1))])


def clamped(shape: tuple[int, ...], energy: pcsim.Energy | None = None) -> pcsim.Simulator:
    """An edge into an output of any shape, with any energy."""
    net = pcsim.Network()
    net.add_node("input", (64,))
    net.add_node("output", shape, energy=energy)
    net.add_edge("input", "output", nn.Sequential(nn.Linear(64, math.prod(shape)), nn.Unflatten(1, shape)))
    return pcsim.Simulator(net, pcsim.Relaxation(1, 0.1))


SOFT = torch.tensor([0.7, 0.2, 0.1]).expand(8, 3)


@pytest.mark.parametrize(
    ("shape", "energy", "targets", "classes"),
    [
        ((3,), None, EIGHT % 3, True),
        ((3,), None, torch.eye(3)[EIGHT % 3], True),
        ((3,), None, torch.eye(3, dtype=torch.bool)[EIGHT % 3], True),
        ((3, 2), None, torch.eye(3)[EIGHT % 3][:, :, None].expand(8, 3, 2), True),
        ((3, 2), pcsim.CrossEntropy(), SOFT[:, :, None].expand(8, 3, 2), True),
        ((2, 3), pcsim.CrossEntropy(axis=-2), torch.ones(8, 2, 3) / 2, True),
        ((3,), pcsim.CrossEntropy(), SOFT, True),
        ((2, 3), pcsim.CrossEntropy(axis=1), SOFT[:, None].expand(8, 2, 3), True),
        ((2, 1), pcsim.CrossEntropy(axis=1), torch.ones(8, 2, 1), False),
        ((3,), None, SOFT, False),
        ((3,), None, torch.zeros(8, 3), False),
        ((3,), None, 1 - torch.eye(3)[EIGHT % 3], False),
        ((3,), None, torch.tensor([2.0, -1.0, 0.0]).expand(8, 3), False),
        ((1,), None, torch.ones(8, 1), False),
    ],
)
def test_accuracy_is_measured_where_targets_are_classes(
    shape: tuple[int, ...], energy: pcsim.Energy | None, targets: Tensor, classes: bool
) -> None:
    images = noise()[0][0]
    pairs, own = [(images, targets)], trainer(clamped(shape, energy))
    assert own.evaluate(pairs).keys() == ({"energy", "accuracy"} if classes else {"energy"})
    values = targets if targets.dim() > 1 else torch.eye(3)[targets]
    named = trainer(clamped(shape, energy), clamps=lambda batch: {"input": batch[0], "output": values.float()})
    found = named.fit(pairs, epochs=2, validation=pairs)
    assert all(record.validation.keys() == own.evaluate(pairs).keys() for record in found.records)
    assert trainer(clamped(shape, energy), metrics=[RelaxedEnergy()]).evaluate(pairs).keys() == {"energy"}


def test_a_batch_that_does_not_fit_chooses_no_metrics() -> None:
    images, targets = noise()[0]
    by_hand = trainer(clamps=lambda batch: {"input": batch[0], "output": batch[1]})
    for own in (trainer(), by_hand):
        for wrong in (torch.zeros(8, 4), torch.tensor(0.0)):
            with pytest.raises(ClampError):
                own.evaluate([(images, wrong)])
        assert own.evaluate([(images, targets)]).keys() == {"energy", "accuracy"}


def test_mean_squared_error_is_that_of_torch() -> None:
    own, batches = trainer(metrics=[pcsim.MeanSquaredError()]), noise()
    images, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    predicted = own.simulator.predict({"input": images})["output"]
    assert own.evaluate(batches) == {
        "mean_squared_error": pytest.approx(nn.functional.mse_loss(predicted, targets).item())
    }
    before = nn.functional.mse_loss(own.simulator.predict({"input": batches[0][0]})["output"], batches[0][1])
    trained = own.fit(batches[:1], epochs=1).of("mean_squared_error")
    assert trained == [pytest.approx(before.item())]
    assert pcsim.EarlyStopping("mean_squared_error").mode == "min"


def test_mean_squared_error_of_units_that_are_given() -> None:
    images, targets = noise()[0]
    masks = torch.arange(80).view(8, 10) % 3 > 0
    targets = torch.where(masks, targets, math.nan)
    for mask, kept in ((masks, masks), (masks[0], masks[:1].expand(8, 10))):
        own = trainer(
            metrics=[pcsim.MeanSquaredError()],
            clamps=lambda batch, mask=mask: {"input": batch, "output": (torch.nan_to_num(targets), mask)},
        )
        predicted = own.simulator.predict({"input": images})["output"]
        expected = (predicted - torch.nan_to_num(targets))[kept].square().mean().item()
        assert own.evaluate([images]) == {"mean_squared_error": pytest.approx(expected)}


def test_metrics_of_batches_of_which_little_is_given() -> None:
    """Each counts for what it gives, and one that gives nothing for nothing."""
    images = torch.randn(4, 64)
    targets = torch.eye(10)[torch.arange(4)]
    some = torch.tensor([True, True, False, False]).unsqueeze(1).expand(4, 10)
    unit = torch.zeros(4, 10, dtype=torch.bool).index_fill(1, torch.tensor(0), True)
    own = trainer(
        metrics=[pcsim.MeanSquaredError(), Accuracy()],
        clamps=lambda mask: {"input": images, "output": (torch.where(mask, targets, math.nan), mask)},
    )
    predicted = own.simulator.predict({"input": images})["output"]
    squared = (predicted - targets).square()
    right = (predicted.argmax(1) == targets.argmax(1)).float()
    found = own.evaluate([some, torch.zeros_like(some), unit])
    assert found["mean_squared_error"] == pytest.approx(float((squared[:2].sum() + squared[:, 0].sum()) / 24))
    assert found["accuracy"] == pytest.approx(float(right[:2].mean()))
    assert own.evaluate([torch.zeros_like(some)]) == {}


def test_mean_squared_error_needs_a_target() -> None:
    own = trainer(metrics=[pcsim.MeanSquaredError()], clamps=lambda batch: {"input": batch[0]})
    with pytest.raises(SettingError, match="MeanSquaredError needs a clamped target"):
        own.evaluate(noise(1))


class Reported(SGD):
    """Writes down the sizes of what it steps by: its hooks come before ``step``."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, lr=1e-3)
        self.sizes: dict[str, list[float]] = {"norm": [], "value": []}

    def step(self, closure: Any = None) -> None:
        found = torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"] if p.grad is not None])
        self.sizes["norm"].append(float(found.norm()))
        self.sizes["value"].append(float(found.abs().max()))
        super().step(closure)


CLIPS = {"norm": torch.nn.utils.clip_grad_norm_, "value": torch.nn.utils.clip_grad_value_}


@pytest.mark.parametrize("by", CLIPS)
def test_clipping_is_that_of_torch(by: Any) -> None:
    own = trainer(clip=0.02, clip_by=by)
    own.fit(noise(), epochs=2)
    hand = simulator()
    optimizer = AdamW(hand.network.parameters(), lr=3e-3)
    for images, targets in noise() * 2:
        hand.infer({"input": images, "output": targets})
        hand.compute_gradients()
        CLIPS[by](hand.network.parameters(), 0.02)
        optimizer.step()
    assert same(weights(own.simulator), weights(hand))
    unclipped = trainer()
    unclipped.fit(noise(), epochs=2)
    assert not same(weights(own.simulator), weights(unclipped.simulator))


@pytest.mark.parametrize("by", CLIPS)
def test_sparse_gradients_are_not_clipped(by: Any) -> None:
    net = pcsim.Network()
    net.add_node("input", (3,))
    net.add_node("output", (2,))
    net.add_edge("input", "output", nn.EmbeddingBag(7, 2, sparse=True, mode="sum"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    own = pcsim.Trainer(pcsim.Simulator(net), optimizer, clip=0.1, clip_by=by, progress=False)
    with pytest.raises(SettingError, match=r"clip: the gradient of 'edges.input->output.module.weight' has the layout"):
        own.fit([(torch.randint(7, (5, 3)), torch.randn(5, 2))], epochs=1)


def test_a_module_that_is_exchanged_after_the_trainer_is_made() -> None:
    own = trainer()
    own.simulator.network.edges["input->hidden1"].module = nn.Linear(64, 32)
    with pytest.raises(SettingError, match="holds 2 parameters that this network had and that have been replaced"):
        own.fit(noise(), epochs=1)


@pytest.mark.parametrize("by", CLIPS)
def test_every_step_of_the_incremental_rule_is_clipped(by: Any) -> None:
    sim = simulator(rule=pcsim.IncrementalUpdate())
    optimizer = Reported(sim.network.parameters())
    own = trainer(sim, optimizer=optimizer, clip=0.01, clip_by=by)
    own.fit(noise(1), epochs=1)
    assert optimizer.sizes[by] == [pytest.approx(0.01, rel=1e-5)] * 4
    sim.update(dict(zip(("input", "output"), noise()[0], strict=True)), optimizer)  # not the trainer's: not clipped
    assert min(optimizer.sizes[by][4:]) > 0.02


def test_inputs_take_the_dtype_of_the_network() -> None:
    sim = simulator()
    sim.network.double()
    trainer(sim).fit(noise(), epochs=1)
    assert sim.network["output"].value.dtype == torch.float64


def test_clamps_function() -> None:
    sim = simulator()
    net = sim.network

    def clamps(batch: Mapping[str, Tensor]) -> dict[pcsim.Node, Tensor]:
        return {net["input"]: batch["image"], net["output"]: batch["label"]}

    own = trainer(sim, clamps=clamps, inputs="unused", target=net["output"])
    own.fit([{"image": images, "label": targets} for images, targets in noise()], epochs=1)
    usual = trainer()
    usual.fit(noise(), epochs=1)
    assert same(weights(sim), weights(usual.simulator))


def test_without_a_target_and_with_masks() -> None:
    """A memory: one node is given, in part, and nothing is predicted."""
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("cause", (4,), prior=0.0)
    net.add_node("pattern", (8,))
    net.add_edge("cause", "pattern", nn.Linear(4, 8))
    sim = pcsim.Simulator(net, pcsim.Relaxation(steps=5, rate=0.1))
    seen = torch.arange(8) < 6
    own = trainer(sim, target=None, clamps=lambda batch: {"pattern": (batch, seen)})
    history = own.fit([torch.ones(4, 8)] * 30, epochs=2, validation=[torch.ones(4, 8)])
    assert history.records[-1].train.keys() == {"energy"}
    assert history.of("energy", "validation")[-1] < history.of("energy")[0]


def generative() -> pcsim.Simulator:
    """Causes with a prior that predict an image."""
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("cause", (4,), prior=0.0)
    net.add_node("image", (8,))
    net.add_edge("cause", "image", nn.Linear(4, 8))
    return pcsim.Simulator(net, pcsim.Relaxation(steps=5, rate=0.1))


IMAGES = torch.linspace(-1, 1, 80).view(10, 8).sin()


@pytest.mark.parametrize(
    "batches",
    [
        list(IMAGES.split(4)),
        DataLoader(TensorDataset(IMAGES), 4),
        [(images, torch.zeros(len(images))) for images in IMAGES.split(4)],
        [(images, ["of no matter"], 3) for images in IMAGES.split(4)],
        DataLoader(IMAGES, 4),
    ],
    ids=["tensors", "of one", "pairs", "more", "no tuples"],
)
def test_without_a_target_inputs_are_learned(batches: Any) -> None:
    own = trainer(generative(), inputs="image", target=None, relaxed_every=1)
    history = own.fit(batches, epochs=2, validation=batches)
    hand = generative()
    optimizer, energies = AdamW(hand.network.parameters(), lr=3e-3), []
    for images in IMAGES.split(4) * 2:
        hand.update({"image": images}, optimizer)
        energies.append(sum(float(energy.sum()) for energy in hand.energy().values()))
    assert same(weights(own.simulator), weights(hand))
    assert history.of("energy") == [pytest.approx(sum(energies[k : k + 3]) / 10) for k in (0, 3)]
    hand.infer({"image": IMAGES})
    now = sum(float(energy.mean()) for energy in hand.energy().values())
    assert own.evaluate(batches) == {"energy": pytest.approx(now)}
    assert history.of("energy", "validation")[-1] == pytest.approx(now)


@pytest.mark.parametrize("batch", [[], ["words"], {"image": IMAGES}, 5])
def test_without_a_target_a_batch_begins_with_a_tensor(batch: Any) -> None:
    own = trainer(generative(), inputs="image", target=None)
    with pytest.raises(SettingError, match="expected a tensor of inputs"):
        own.fit([batch], epochs=1)


def test_history_as_a_table() -> None:
    pandas = pytest.importorskip("pandas")
    own = trainer(relaxed_every=1)
    own.fit(noise(), epochs=1)
    history = own.fit(noise(), epochs=2, validation=noise(1))
    table = history.to_dataframe()
    assert list(table.index) == [1, 2, 3]
    assert table.index.name == "epoch"
    metrics = [f"{part}_{name}" for part in ("train", "validation") for name in ("energy", "accuracy")]
    assert list(table.columns) == ["learning_rate", "seconds", *metrics]
    for name in ("energy", "accuracy"):
        assert table[f"train_{name}"].tolist() == history.of(name)
        assert table[f"validation_{name}"].isna().tolist() == [True, False, False]
        assert table[f"validation_{name}"].tolist()[1:] == [record.validation[name] for record in history.records[1:]]
    assert table["seconds"].tolist() == [record.seconds for record in history.records]
    assert (table["learning_rate"] == 3e-3).all()
    empty = pcsim.History().to_dataframe()
    assert isinstance(empty, pandas.DataFrame)
    assert empty.empty
    assert list(empty.columns) == ["learning_rate", "seconds"]


def test_a_table_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(PCError, match=r"pip install 'pcsim\[pandas\]'"):
        History().to_dataframe()


def robust(
    rule: pcsim.LearningRule, precision: pcsim.PrecisionSchedule, width: float = 6.0, threshold: float = 1.0
) -> Trainer:
    """Outliers at a robust energy behind latents that can explain them away."""
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([64, 32, 32, 1], activation=nn.Identity, energy=pcsim.Huber(threshold))
    with torch.no_grad():
        net.edges["hidden2->output"].module.weight.mul_(width)
    return trainer(pcsim.Simulator(net, pcsim.Relaxation(60, 0.02, precision=precision), rule))


FAR = [(images, 30 * torch.ones(len(images), 1)) for images, _ in noise()]


def test_a_robust_energy_that_cannot_be_robust_warns_once() -> None:
    own = robust(pcsim.SettledUpdate(), pcsim.Constant())
    with pytest.warns(EnergyWarning, match=r"node 'output': of 8 outliers .* leaves 0, .*Huber\(threshold=1") as told:
        own.fit(FAR, epochs=2)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("rule", "precision", "width", "threshold"),
    [
        (pcsim.SettledUpdate(), pcsim.Constant(), 0.1, 1.0),  # the latents cannot explain them
        (pcsim.ForwardUpdate(), pcsim.Constant(), 6.0, 1.0),
        (pcsim.ArrivalUpdate(), pcsim.Spiking(alpha=0.0, peak=25.0), 3.4, 10.0),
        (pcsim.Backprop(), pcsim.Constant(), 6.0, 1.0),
    ],
)
def test_where_outliers_reach_the_weights_nothing_is_said(
    rule: pcsim.LearningRule, precision: pcsim.PrecisionSchedule, width: float, threshold: float
) -> None:
    own = robust(rule, precision, width, threshold)
    own.fit(FAR, epochs=1)  # a warning would fail
    assert pcsim.diagnosis.outliers(own.simulator)["output"].absorbed == (not rule.backprop and width > 1)


class Stream(IterableDataset[Batch]):
    """A data set that does not know its length."""

    def __iter__(self) -> Iterator[Batch]:
        return ((images[0], targets[0]) for images, targets in noise(6))


def test_streams_of_unknown_length_and_single_use_generators() -> None:
    own = trainer(progress=True)
    assert len(own.fit(DataLoader(Stream(), 2), epochs=2).records) == 2
    own.fit((batch for batch in noise()), epochs=1)
    with pytest.raises(SettingError, match="no batches given"):
        own.evaluate(batch for batch in list[Batch]())


def test_progress_shows_energy_and_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(progress=True).fit(noise(), epochs=2, validation=noise(1))
    shown = capsys.readouterr().err
    assert "epoch 2/2: 100%" in shown
    assert all(name in shown for name in (" energy=", " accuracy=", "validation_energy=", "validation_accuracy="))
    trainer().fit(noise(), epochs=1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rule", [pcsim.SettledUpdate(), pcsim.IncrementalUpdate()])
@pytest.mark.parametrize("rate", [1e9, 1e30], ids=["gradients overflow", "latents overflow"])
def test_divergence_leaves_the_weights_of_the_last_good_batch(rule: pcsim.LearningRule, rate: float) -> None:
    sim = simulator(rule=rule)
    own = trainer(sim)
    own.fit(noise(1), epochs=1)
    before, moments = weights(sim), own.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    sim.relaxation = pcsim.Relaxation(steps=4, rate=rate)
    with pytest.raises(DivergenceError, match=r"epoch 2, batch 0: .*it changed no weights"):
        own.fit(noise(2), epochs=1)
    assert same(before, weights(sim))
    assert torch.equal(own.optimizer.state_dict()["state"][0]["exp_avg"], moments)
    assert all(math.isfinite(number) for number in own.history.of("energy"))
    sim.relaxation = pcsim.Relaxation(steps=4, rate=0.2)
    own.fit(noise(2), epochs=1)
    assert len(own.history.records) == 2


def foreign_optimizer() -> AdamW:
    """An optimizer of some other network."""
    return AdamW(nn.Linear(2, 2).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "optimizer: 'adam' given, expected an optimizer"),
        ({"optimizer": foreign_optimizer()}, "holds parameters of the network"),
        ({"scheduler": StepLR(foreign_optimizer(), 1)}, "made for the trainer's optimizer"),
        ({"schedule_per": "year"}, "'year' given, expected 'epoch' or 'batch'"),
        ({"monitor": "energy"}, "for a ReduceLROnPlateau only"),
        ({"inputs": "image"}, "inputs: 'image' given, expected a node of the network: 'input', 'hidden1'"),
        ({"target": "digit"}, "target: 'digit' given"),
        ({"target": None}, "inputs: 'input' given, expected a node that others predict"),
        ({"clip": 0.0}, "clip: 0.0 given, expected a number above 0"),
        ({"clip": True}, "clip: True given"),
        ({"clip": math.inf}, "clip: inf given"),
        ({"clip": 1.0, "clip_by": "length"}, "clip_by: 'length' given, expected 'norm' or 'value'"),
        ({"clamps": {"input": 1}}, "a function from a batch to clamps"),
        ({"metrics": ["accuracy"]}, "instances of pcsim.metrics.Metric"),
        ({"metrics": [Accuracy]}, "instances of pcsim.metrics.Metric"),
        ({"callbacks": [print]}, "instances of pcsim.callbacks.Callback"),
        ({"relaxed_every": 0}, "relaxed_every: 0 given, expected a whole number of at least 1"),
        ({"seed": -1}, "seed: -1 given"),
        ({"seed": 1.5}, "seed: 1.5 given"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        trainer(**options)


def test_a_simulator_is_needed() -> None:
    net = pcsim.topologies.mlp([2, 2])
    with pytest.raises(SettingError, match=r"expected a pcsim\.Simulator"):
        Trainer(net, AdamW(net.parameters()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "epochs", "message"),
    [
        (noise, 0, "epochs=0 given"),
        (noise, True, "epochs=True given"),
        (noise, 1.5, "epochs=1.5 given"),
        (list, 1, "train: list given without batches"),
        (lambda: 5, 1, "train: int given, expected batches"),
        (lambda: iter(noise()), 2, "used up after one epoch"),
        (lambda: [torch.zeros(2, 64)], 1, "batch of type Tensor given, expected a pair of tensors.*give target=None"),
        (lambda: [{"image": torch.zeros(2, 64)}], 1, "batch of type dict given"),
        (lambda: [(torch.zeros(2, 64), [1, 2])], 1, "batch of type tuple given"),
        (
            lambda: [(torch.zeros(2, 64), torch.tensor([0, 10]))],
            1,
            "from 0 to 10 given, expected class numbers from 0 to 9",
        ),
    ],
)
def test_bad_batches_are_refused_before_anything_is_learned(make: Callable[[], Any], epochs: Any, message: str) -> None:
    own = trainer()
    before = weights(own.simulator)
    with pytest.raises(SettingError, match=message):
        own.fit(make(), epochs=epochs)
    assert same(before, weights(own.simulator))
    assert own.history.records == []


def test_what_was_not_measured_is_refused() -> None:
    own = trainer(metrics=FREE_OF_CHARGE)
    history = own.fit(noise(1), epochs=1)
    with pytest.raises(SettingError, match="'energy' given, but train measured 'accuracy'"):
        history.of("energy")
    with pytest.raises(SettingError, match="but validation measured nothing"):
        history.of("accuracy", "validation")
    with pytest.raises(SettingError, match="measured twice"):
        trainer(metrics=[Accuracy(), Accuracy()]).evaluate(noise(1))
    with pytest.raises(SettingError, match="needs a clamped target"):
        trainer(clamps=lambda batch: {"input": batch[0]}, metrics=FREE_OF_CHARGE).evaluate(noise(1))
    for nothing in (None, {}):
        with pytest.raises(SettingError, match="expected a mapping from nodes"):
            trainer(clamps=lambda batch, given=nothing: given, metrics=FREE_OF_CHARGE).evaluate(noise(1))


class Noting(Callback):
    """What a trainer tells, and when."""

    def __init__(self) -> None:
        self.measured: list[set[str]] = []
        self.ends: list[int] = []

    def on_batch_end(self, trainer: Trainer, record: BatchRecord) -> None:
        self.measured.append(set(record.metrics))

    def on_fit_end(self, trainer: Trainer, history: History) -> None:
        self.ends.append(len(history.records))


def test_every_option_at_a_value_of_its_own() -> None:
    """Other names of nodes, two callbacks, a rhythm that is neither 1 nor longer than the epoch."""
    torch.manual_seed(0)
    net = pcsim.Network()
    for name, size in (("picture", 6), ("middle", 5), ("label", 3)):
        net.add_node(name, (size,))
    net.add_edge("picture", "middle", nn.Linear(6, 5))
    net.add_edge("middle", "label", nn.Linear(5, 3))
    sim, draw = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1)), torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 6, generator=draw), torch.randint(3, (4,), generator=draw)) for _ in range(5)]
    first, second = Noting(), Noting()
    optimizer = SGD(net.parameters(), 0.1)
    own = Trainer(
        sim,
        optimizer,
        inputs=net["picture"],
        target=net["label"],
        metrics=[Accuracy(), RelaxedEnergy(), ErrorByLevel()],
        relaxed_every=2,
        callbacks=[first, second],
        scheduler=StepLR(optimizer, 1, 0.5),
        schedule_per="epoch",
        progress=False,
        seed=3,
    )
    own.fit(batches, epochs=2)
    own.fit(batches, epochs=1)
    for callback in (first, second):
        assert [len(names) > 1 for names in callback.measured] == [True, False, True, False, True] * 3
        assert callback.ends == [2, 3]
    assert own.learning_rate == pytest.approx(0.1 / 8)
    assert [record.epoch for record in own.history.records] == [1, 2, 3]


def test_evaluation_relaxes_every_so_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    own, infer, sizes = trainer(relaxed_every=2), pcsim.Simulator.infer, list[int]()

    def counted(sim: pcsim.Simulator, clamps: Any, **options: Any) -> pcsim.Trace:
        sizes.append(len(clamps["input"]))
        return infer(sim, clamps, **options)

    monkeypatch.setattr(pcsim.Simulator, "infer", counted)
    own.evaluate(noise(4, 6))
    assert len(sizes) == 2


def test_what_is_watched_is_of_validation_where_both_are_measured() -> None:
    """Training that gets better while validation gets worse."""
    own = trainer(metrics=[Accuracy()])
    record = EpochRecord(1, 0.1, {"accuracy": 1.0}, {"accuracy": 0.25}, 0.1)
    own.history.records.append(record)
    assert own.history.of("accuracy", "validation") == [0.25]
    assert own.history.of("accuracy", "train") == [1.0]
    seen: list[float] = []
    optimizer = SGD(own.simulator.network.parameters(), 0.1)
    plateau = ReduceLROnPlateau(optimizer, mode="max", patience=0)
    step = plateau.step
    plateau.step = lambda metric, *rest: (seen.append(float(metric)), step(metric, *rest))[1]
    watching = Trainer(
        own.simulator, optimizer, scheduler=plateau, monitor="accuracy", metrics=[Accuracy()], progress=False
    )
    classes = torch.arange(8) % 10
    images = torch.eye(64)[:8]
    batches, others = [(images, classes)], [(images, (classes + 1) % 10)]
    watching.fit(batches, epochs=30, validation=others)
    assert watching.history.of("accuracy")[-1] != watching.history.of("accuracy", "validation")[-1]
    assert seen == watching.history.of("accuracy", "validation")


def test_accuracy_is_along_the_first_axis_of_a_node() -> None:
    output = torch.zeros(2, 3, 4)
    output[:, 1] = 1.0
    target = torch.zeros(2, 3, 4)
    target[0, 1] = target[1, 2] = 1.0
    net = pcsim.topologies.mlp([2, 2])
    assert float(Accuracy().measure(Outcome(net, target, output, None))["accuracy"]) == 0.5


def test_seeds_of_neighbouring_runs_share_no_epoch() -> None:
    def drawn(seed: int) -> list[int]:
        class Drawing(Callback):
            def on_batch_end(self, trainer: Trainer, record: BatchRecord) -> None:
                found.append(int(torch.randint(2**31, ())))

        found: list[int] = []
        trainer(seed=seed, callbacks=[Drawing()], metrics=FREE_OF_CHARGE).fit(noise(1), epochs=3)
        return found

    assert len({*drawn(0), *drawn(1), *drawn(2)}) == 9


def test_a_schedule_stays_at_its_end() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], 1.0)
    schedule = pcsim.warmup_cosine(optimizer, 10, warmup=0.2, peak=3.0, end=0.25)
    factors = [schedule.lr_lambdas[0](step) for step in (0, 1, 2, 6, 10, 15, 40)]
    assert factors == pytest.approx([1.0, 2.0, 3.0, 1.625, 0.25, 0.25, 0.25])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"metrics": pcsim.Accuracy()},
            r"metrics: one given by itself, expected a list of them; write metrics=\[...\]",
        ),
        ({"callbacks": pcsim.EarlyStopping("accuracy")}, "callbacks: one given by itself"),
        ({"clip_by": "value"}, r"clip_by.*a size at which to clip beside it"),
    ],
    ids=["metrics", "callbacks", "clip_by"],
)
def test_what_is_given_by_itself_is_refused(given: dict[str, Any], message: str) -> None:
    net = pcsim.topologies.mlp([4, 3, 2])
    with pytest.raises(SettingError, match=message):
        pcsim.Trainer(pcsim.Simulator(net), torch.optim.SGD(net.parameters(), 0.1), **given)
