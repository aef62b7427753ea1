"""Training over batches: fit and evaluate, with progress, metrics, schedulers and callbacks."""

from __future__ import annotations

import copy
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import length_hint
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from pcsim import diagnosis, io
from pcsim.callbacks import BatchRecord, Callback, EpochRecord, History
from pcsim.clamps import Clamps, Given, Stream
from pcsim.distributed import Processes, Shares
from pcsim.errors import DivergenceError, EnergyWarning, FileError, SettingError
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.graph.probing import in_mode
from pcsim.graph.statistics import buffers_put_back
from pcsim.messages import is_number
from pcsim.metrics import Accuracy, Metric, Outcome, PartialMean, RelaxedEnergy, RunningMeans, measure_all
from pcsim.random_state import random_state_kept
from pcsim.simulator import Simulator
from pcsim.targets import class_axis, target_values, tells_classes
from pcsim.trace import Trace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SECONDS_BETWEEN_DISPLAYS = 0.2
EPOCHS_APART = 1_000_003
"""Seeds of the epochs of two runs with neighbouring seeds are so far apart."""
CHECKPOINT = "training"
Share = tuple[dict[str, Given], int]
"""Clamps of a batch, or of a share of it, and how many samples it counts for."""


class Trainer:
    """Trains a simulator's network over batches from any iterable, such as a ``DataLoader``.

    Batches are (input, target) pairs of tensors; with ``target=None``, tensors of inputs, or sequences that begin with
    one, whose rest is left alone: nothing supervises, and the node ``inputs``, which then has to be predicted by
    others, is learned. Targets have their node's shape, (batch, *shape), or are numbers of classes: integers of shape
    (batch,) for a node of one axis and two units or more become one-hot, and so do those of the node's shape without
    the axis of its cross-entropy. Modules train in the mode (training or evaluation) that they are in. With a seed, two
    runs from equal weights are equal bit for bit, as far as the device's kernels are, and so is one that goes on from a
    checkpoint: at the start of every epoch, torch's generator and those of the loaders are seeded by the seed and the
    number of the epoch. What they held is not put back, nor are latents: with ``Relaxation(start="previous")`` a run
    that goes on starts afresh.

    Where torch.distributed is initialised, all processes train together, as one would with the whole batches: each
    calls the same methods and takes its share of every batch, gradients are averaged over the samples at every step of
    the optimizer, metrics are of all samples, and the first process shows progress and writes checkpoints. An error in
    one process ends the call in all of them.

    Args:
        simulator: infers and learns on each batch.
        optimizer: of the network's parameters.
        scheduler: any of torch's learning rate schedulers, of this optimizer.
        schedule_per: step the scheduler after every "epoch" or every "batch".
        monitor: the metric that a ``ReduceLROnPlateau`` watches: of validation, or of training where there is none.
        inputs: node to which a batch's inputs are clamped, or its name.
        target: node to which its targets are clamped and which evaluation predicts, or its name; None for none, as in
            unsupervised learning.
        clamps: makes the clamps from a batch, where it is no such pair; ``target`` keeps its meaning.
        metrics: what to measure; relaxed energy by default, and accuracy where the targets of the first batch are
            classes: one-hot, or of a node with a cross-entropy.
        relaxed_every: measure metrics of the relaxed state on the first batch of each epoch and evaluation, and on
            every so-many-th after it; 1 for every batch.
        clip: the largest that gradients may be at a step of the optimizer, > 0; None leaves them as they are.
        clip_by: "norm" scales all gradients of the network together, so that their norm is at most ``clip``
            (``torch.nn.utils.clip_grad_norm_``); "value" cuts each number to ± ``clip`` (``clip_grad_value_``).
        callbacks: called in this order.
        progress: show a bar for each epoch.
        seed: at least 0; None leaves the random state as it is; several processes draw one for every epoch then.
        process_group: the processes that train together; the default group where torch.distributed is initialised. In
            a group of one, a process trains by itself.

    Raises:
        SettingError: an argument does not fit.
    """

    def __init__(
        self,
        simulator: Simulator,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        schedule_per: Literal["epoch", "batch"] = "epoch",
        monitor: str | None = None,
        inputs: Node | str = "input",
        target: Node | str | None = "output",
        clamps: Callable[[Any], Clamps] | None = None,
        metrics: Sequence[Metric] | None = None,
        relaxed_every: int = 100,
        clip: float | None = None,
        clip_by: Literal["norm", "value"] = "norm",
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        seed: int | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.simulator = simulator
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.schedule_per = schedule_per
        self.monitor = monitor
        self.inputs = inputs.name if isinstance(inputs, Node) else inputs
        self.target = target.name if isinstance(target, Node) else target
        self.clamps = clamps
        for name, alone in (("metrics", isinstance(metrics, Metric)), ("callbacks", isinstance(callbacks, Callback))):
            if alone:
                raise SettingError(f"Trainer: {name}: one given by itself, expected a list of them; write {name}=[...]")
        self.metrics: tuple[Metric, ...] = (RelaxedEnergy(),) if metrics is None else tuple(metrics)
        self.relaxed_every = relaxed_every
        self.clip = clip
        self.clip_by = clip_by
        self.callbacks = tuple(callbacks)
        self.progress = progress
        self.seed = seed
        self.process_group = process_group
        self.history = History()
        self._stopped = self._stepping = self._warned = False
        self._chooses_metrics = metrics is None and self.target is not None
        """Whether the first batch with a target is still to say whether it is classes."""
        self._samples = 0
        """How many samples the batch at hand counts for."""
        self._known_processes: tuple[object, Processes] | None = None
        for name, fits, expected in self._expectations():
            if not fits:
                given = getattr(self, name)
                shown = type(given).__name__ if isinstance(given, Optimizer) else repr(given)
                raise SettingError(f"Trainer.{name}: {shown} given, expected {expected}")
        simulator.check_optimizer(optimizer)

    def fit(self, train: Iterable[Any], *, epochs: int, validation: Iterable[Any] | None = None) -> History:
        """Train for so many epochs more; ``trainer.history`` grows, and is returned.

        Args:
            train: batches, gone through once per epoch.
            epochs: at least 1.
            validation: evaluated after every epoch; changes nothing, unless relaxation starts from previous values.

        Raises:
            SettingError, ClampError: an argument or a batch does not fit.
            DivergenceError: a latent is no longer finite; the weights are as the last good batch left them.
        """
        with self._together() as processes:
            self._check_fit(train, epochs, validation)
            shares, validated = processes.divide(train), None if validation is None else processes.divide(validation)
            self._begin_alike()
            self._stopped = False
            first = len(self.history.records) + 1
            try:
                for callback in self.callbacks:
                    callback.on_fit_start(self)
                for epoch in range(first, first + epochs):
                    self._stopped, _ = processes.agree(stop=self._stopped)
                    if self._stopped:
                        break
                    self._seed(epoch, train, validation)
                    record = self._epoch(epoch, first + epochs - 1, shares, validated)
                    self.history.records.append(record)
                    self._schedule("epoch", record.validation or record.train)
                    for callback in self.callbacks:
                        callback.on_epoch_end(self, record)
            finally:
                for callback in self.callbacks:
                    callback.on_fit_end(self, self.history)
            return self.history

    def _check_fit(self, train: Iterable[Any], epochs: int, validation: Iterable[Any] | None) -> None:
        if not _whole(epochs, 1):
            raise SettingError(f"Trainer.fit: epochs={epochs!r} given, expected a whole number of at least 1")
        _check_loader("train", train, repeated=epochs > 1)
        if validation is not None:
            _check_loader("validation", validation, repeated=epochs > 1)
        for callback in self.callbacks:
            if validation is None and callback.watches is not None:
                raise SettingError(
                    f"Trainer.fit: no validation given, but {type(callback).__name__} reads {callback.watches!r} "
                    "of it; give validation="
                )
        stops = self.simulator.relaxation.tolerance is not None
        if stops and self.simulator.rule.every_step and not self._processes.alone:
            raise SettingError(
                f"Trainer.fit: Relaxation(tolerance={self.simulator.relaxation.tolerance}) given, with which each of "
                f"{self._processes.size} processes may take another number of steps, and "
                f"{type(self.simulator.rule).__name__}, which averages gradients at every one; leave out the tolerance"
            )

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Metrics averaged over the samples, all modules in evaluation mode.

        Weights, running statistics and the random state stay; nodes and edges show the last batch that was relaxed.
        Several processes each evaluate a share, and all return the same.

        Raises:
            PCError: there is no batch, or as :meth:`Simulator.predict` and :meth:`Simulator.infer`.
        """
        with self._together() as processes:
            _check_loader("evaluation", batches, repeated=False)
            processes.average_buffers(self.simulator.network)
            return self._evaluate(processes.divide(batches))

    def _evaluate(self, shares: Shares) -> dict[str, float]:
        simulator, means = self.simulator, RunningMeans()
        relaxing = any(metric.relaxed for metric in self.metrics)
        with self._processes.draws_put_back(), _evaluating(simulator.network):
            for index, (clamps, samples) in enumerate(shares.clamps(0, self._clamp)):
                trace = simulator.infer(clamps) if relaxing and index % self.relaxed_every == 0 else None
                given = {name: clamp for name, clamp in clamps.items() if name != self.target}
                output = simulator.predict(given)[self.target] if given and self.target is not None else None
                self._measure(means, clamps, samples, output, trace)
        return means.read(self._processes.gather)

    def stop(self) -> None:
        """End the training after the present batch; its epoch is still validated and recorded."""
        self._stopped = True

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write all that training goes on from to one file, which is whole or not there.

        That is the network's parameters and buffers, the optimizer, the scheduler, the history, and what callbacks
        keep. Random states are not: with a seed, every epoch has its own.

        Of several processes the first writes it.

        Raises:
            FileError: the file cannot be written, or something of the optimizer's or the scheduler's kept in it.
        """
        if self.is_first_process:
            io.save(path, CHECKPOINT, {"kinds": self._kinds(), **self._state()})

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Go back to where a checkpoint was written; ``fit`` goes on from there, with any number of processes.

        Of several processes, which all have to call this, the first reads the file.

        Raises:
            FileError: the file is damaged or foreign, or was written for another network, or with another kind of
                optimizer, scheduler, learning rule or callbacks; nothing has changed then, whatever it is that fails.
        """
        with self._together() as processes:
            tree = processes.from_first(lambda: io.load(path, CHECKPOINT))
            io.check_state(path, "the network's", self.simulator.network.state_dict(), tree["network"])
            own = self._kinds()
            for part, there in tree.get("kinds", own).items():
                here = own[part]
                if there != here:
                    raise FileError(
                        f"{path}: was written with the {part} {there}, and here it is {here}; make the trainer as it "
                        "was made then"
                    )
            before = copy.deepcopy(self._state())
            try:
                self._take_over(tree)
            except BaseException:
                self._take_over(before)
                raise

    @property
    def is_first_process(self) -> bool:
        """Whether this process shows and writes: the only one, or the first of those that train together."""
        return self._processes.first

    @property
    def _processes(self) -> Processes:
        """Made anew where torch.distributed has been initialised since, or ended."""
        key = (self.process_group, dist.group.WORLD if dist.is_available() else None)
        if self._known_processes is None or self._known_processes[0] != key:
            self._known_processes = key, Processes(self.process_group)
        return self._known_processes[1]

    @contextmanager
    def _together(self) -> Iterator[Processes]:
        """What all processes do; inside, every step of the optimizer averages the gradients and clips them first."""
        processes = self._processes
        with processes.together():
            if self._stepping:
                yield processes
                return
            hook = self.optimizer.register_step_pre_hook(lambda *_: self._before_step(processes))
            late = self.simulator.checks_late
            self.simulator.checks_late = late and processes.alone  # of several, no process may take a step again
            self._stepping = True
            try:
                yield processes
            finally:
                self._stepping, self.simulator.checks_late = False, late
                hook.remove()

    def _before_step(self, processes: Processes) -> None:
        parameters = list(self.simulator.network.parameters())
        if not processes.alone:
            processes.average_gradients(parameters, self._samples)
        if self.clip is None:
            return
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                name = next(name for name, own in self.simulator.network.named_parameters() if own is parameter)
                raise SettingError(
                    f"Trainer.clip: the gradient of {name!r} has the layout {parameter.grad.layout}, which is not "
                    "clipped; use dense ones, such as those of nn.Embedding(sparse=False), or leave clip out"
                )
        if self.clip_by == "norm":
            clip_grad_norm_(parameters, self.clip)
        else:
            clip_grad_value_(parameters, self.clip)

    def _begin_alike(self) -> None:
        """Let all processes have what the first has: parameters, buffers, optimizer, scheduler, callbacks, history."""
        if self._processes.alone:
            return
        shapes = {name: tuple(tensor.shape) for name, tensor in self.simulator.network.state_dict().items()}
        own = {**self._kinds(), "shapes of parameters and buffers": shapes}
        kinds, state = self._processes.from_first(lambda: (own, self._state()))
        for part, there in kinds.items():
            if own[part] != there:
                raise SettingError(
                    f"the first process has the {part} {there}, and this one {own[part]}; make the trainer alike in all"
                )
        if not self.is_first_process:
            self._take_over(state)

    def _kinds(self) -> dict[str, Any]:
        """What has to be the same where training goes on."""
        return {
            "optimizer": type(self.optimizer).__name__,
            "sizes of the optimizer's groups": [len(group["params"]) for group in self.optimizer.param_groups],
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            "relaxation": type(self.simulator.relaxation).__name__,
            "learning rule": type(self.simulator.rule).__name__,
            "callbacks": [type(callback).__name__ for callback in self.callbacks],
        }

    def _state(self) -> dict[str, Any]:
        return {
            "network": dict(self.simulator.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "history": [attrs.asdict(record) for record in self.history.records],
            "callbacks": [callback.state_dict() for callback in self.callbacks],
        }

    def _take_over(self, state: Mapping[str, Any]) -> None:
        for callback, own in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(own)
        self.simulator.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.history.records[:] = [EpochRecord(**record) for record in state["history"]]

    @property
    def learning_rate(self) -> float:
        """Present learning rate of the optimizer's first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _epoch(self, epoch: int, last: int, train: Shares, validation: Shares | None) -> EpochRecord:
        means, displayed, started = RunningMeans(), 0.0, time.perf_counter()
        silent = not (self.progress and self.is_first_process)
        with tqdm(desc=f"epoch {epoch}/{last}", total=length_hint(train) or None, disable=silent, unit="batch") as bar:
            for index, (clamps, samples) in enumerate(self._until_stopped(train.clamps(epoch, self._clamp))):
                rate, trace = self.learning_rate, self._update(clamps, samples, f"epoch {epoch}, batch {index}")
                output = None if self.target is None else self.simulator.network[self.target].forward_prediction
                shown = trace if index % self.relaxed_every == 0 else None
                measured = self._measure(means, clamps, samples, output, shown)
                self._schedule("batch", measured, samples)
                if shown is not None and not self._warned:
                    self._warn_of_absorbed_outliers()
                for callback in self.callbacks:
                    callback.on_batch_end(self, BatchRecord(epoch, index, trace, measured))
                if not silent and time.perf_counter() - displayed > SECONDS_BETWEEN_DISPLAYS:
                    bar.set_postfix(means.read(), refresh=False)
                    displayed = time.perf_counter()
                bar.update()
            metrics, seconds = means.read(self._processes.gather), time.perf_counter() - started
            self._processes.average_buffers(self.simulator.network)
            validated = {} if validation is None else self._evaluate(validation)
            bar.set_postfix({**metrics, **{f"validation_{name}": number for name, number in validated.items()}})
        return EpochRecord(epoch, rate, metrics, validated, seconds)

    def _warn_of_absorbed_outliers(self) -> None:
        """Say, once, that a robust energy cannot do its work, where the batch at hand shows it."""
        rule, network = self.simulator.rule, self.simulator.network
        if rule.at_forward or rule.at_arrival or rule.backprop or self.simulator.relaxation.hold_predictions:
            return  # what learns from errors of the forward pass learns from outliers as the energy says
        for name, found in diagnosis.outliers(self.simulator).items():
            if found.absorbed:
                self._warned = True
                warnings.warn(
                    f"node {name!r}: of {found.forward} outliers in the forward pass the relaxation leaves "
                    f"{found.relaxed}, since latents explain them away, so that {network[name].energy_function!r} is "
                    "not robust here; let weights learn from the errors of the forward pass, by Spiking() with "
                    "ForwardUpdate() or by ArrivalUpdate()",
                    EnergyWarning,
                    stacklevel=2,
                )

    def _until_stopped(self, shares: Iterator[Share]) -> Iterator[Share]:
        """Batches until there is none, or somebody has called :meth:`stop`."""
        while not (self._processes.alone and self._stopped):
            share = next(shares, None)
            self._stopped, more = self._processes.agree(stop=self._stopped, more=share is not None)
            if share is None or self._stopped or not more:
                return
            yield share

    def _update(self, clamps: dict[str, Given], samples: int, place: str) -> Trace:
        network, self._samples = self.simulator.network, samples
        # A batch that another process cannot finish has already been counted into this one's running statistics.
        counted = () if self._processes.alone else network.modules()
        try:
            with buffers_put_back(counted):
                return self.simulator.update(clamps, self.optimizer)
        except DivergenceError as error:
            if self._processes.over:
                raise
            raise DivergenceError(f"{place}: {error}; it changed no weights") from error

    def _measure(
        self,
        means: RunningMeans,
        clamps: Mapping[str, Given],
        samples: int,
        output: Tensor | None,
        trace: Trace | None,
    ) -> dict[str, Tensor]:
        given = None if self.target is None else clamps.get(self.target)
        target, mask = given if isinstance(given, tuple) else (given, None)
        shown = target.first if isinstance(target, Stream) else target
        measured = measure_all(self.metrics, Outcome(self.simulator.network, shown, output, trace, mask))
        means.add(measured, samples)
        return {name: mean.mean if isinstance(mean, PartialMean) else mean for name, mean in measured.items()}

    def _schedule(
        self, moment: Literal["epoch", "batch"], metrics: Mapping[str, float | Tensor], samples: int = 0
    ) -> None:
        if self.scheduler is None or moment != self.schedule_per:
            return
        if self.monitor is None:
            self.scheduler.step()
        elif self.monitor in metrics:
            if moment == "batch" and not self._processes.alone:
                means = RunningMeans()
                means.add({self.monitor: torch.as_tensor(metrics[self.monitor])}, samples)
                metrics = means.read(self._processes.gather)
            self.scheduler.step(metrics[self.monitor])  # type: ignore[arg-type]
        else:
            known = ", ".join(map(repr, metrics)) or "nothing"
            raise SettingError(f"Trainer.monitor: {self.monitor!r} given, but {known} was measured; choose of those")

    def _seed(self, epoch: int, *loaders: Iterable[Any] | None) -> None:
        if self.seed is None and self._processes.alone:
            return
        if self.seed is None:
            seed = self._processes.from_first(lambda: int(torch.randint(2**62, ()).item()))
        else:
            seed = (self.seed * EPOCHS_APART + epoch) % 2**63
        self._processes.seed(seed)
        for part in loaders:
            while part is not None:  # a loader, its sampler, and what that samples from
                if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                    generator.manual_seed(seed)
                part = getattr(part, "sampler", None)

    def _clamp(self, batch: Any) -> dict[str, Given]:
        if self.clamps is None:
            return self._clamp_parts(batch)
        clamps = self.clamps(batch)
        if not isinstance(clamps, Mapping) or not clamps:
            raise SettingError(f"Trainer.clamps: returned {clamps!r}, expected a mapping from nodes to tensors")
        named = {node.name if isinstance(node, Node) else node: clamp for node, clamp in clamps.items()}
        target = None if self.target is None else named.get(self.target)
        if isinstance(target, Tensor):
            self._choose_metrics(target)
        return named

    def _clamp_parts(self, batch: Any) -> dict[str, Given]:
        """Clamps of a pair of inputs and targets, or of inputs alone."""
        parts: Sequence[Any] = [batch] if isinstance(batch, Tensor) else batch if isinstance(batch, Sequence) else ()
        supervised = self.target is not None
        fits = len(parts) == 2 if supervised and not isinstance(batch, Tensor) else len(parts) > 0 and not supervised
        if not fits or not all(isinstance(part, Tensor) for part in parts[: 1 + supervised]):
            expected = "a pair of tensors, inputs and targets" if supervised else "a tensor of inputs"
            alone = "; of inputs alone, give target=None" if isinstance(batch, Tensor) else ""
            raise SettingError(
                f"batch of type {type(batch).__name__} given, expected {expected}; give Trainer a function clamps= "
                f"that makes clamps from such a batch{alone}"
            )
        network = self.simulator.network
        dtype, device = network.tensor_options()
        named = {self.inputs: parts[0]}
        if self.target is not None:
            named[self.target] = target_values(parts[1], network[self.target])
            self._choose_metrics(named[self.target])  # before it is moved to a device, from where reading it would wait
        moved = {}
        for name, tensor in named.items():
            where, kind = network[name].device or device, tensor.dtype if network[name].integers else dtype
            # What comes to the CPU without waiting may be read before it is there.
            moved[name] = tensor.to(where, kind, non_blocking=where.type != "cpu")
        return moved

    def _choose_metrics(self, target: Tensor) -> None:
        """Measure the accuracy, too, where nobody has said what to measure and the targets are classes."""
        if not self._chooses_metrics or self.target is None:
            return
        node = self.simulator.network[self.target]
        if target.dim() and tuple(target.shape[1:]) == node.shape:  # anything else is refused where it is clamped
            self._chooses_metrics = False
            self.metrics += (Accuracy(class_axis(node)),) if tells_classes(target, node) else ()

    def _expectations(self) -> Iterator[tuple[str, bool, str]]:
        """What each argument must fulfil, lazily: a later one may rest on an earlier one."""
        yield "simulator", isinstance(self.simulator, Simulator), "a pcsim.Simulator"
        network = self.simulator.network
        yield "optimizer", isinstance(self.optimizer, Optimizer), "an optimizer of torch.optim"
        own = {id(parameter) for parameter in network.parameters()}
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        yield "optimizer", bool(own & held), "one that holds parameters of the network: give it network.parameters()"
        of_optimizer = self.scheduler is None or getattr(self.scheduler, "optimizer", None) is self.optimizer
        yield "scheduler", of_optimizer, "a scheduler made for the trainer's optimizer, or None"
        yield "schedule_per", self.schedule_per in ("epoch", "batch"), "'epoch' or 'batch'"
        watches = isinstance(self.scheduler, ReduceLROnPlateau)
        yield "monitor", watches == (self.monitor is not None), "the name of a metric, for a ReduceLROnPlateau only"
        node = f"a node of the network: {', '.join(map(repr, network.nodes))}"
        yield "inputs", self.inputs in network or self.clamps is not None, node
        yield "target", self.target is None or self.target in network, node
        learned = self.target is not None or self.clamps is not None or network[self.inputs].predicted
        yield "inputs", learned, "a node that others predict, from which to learn where there is no target"
        yield "clamps", self.clamps is None or callable(self.clamps), "a function from a batch to clamps, or None"
        yield "metrics", all(isinstance(metric, Metric) for metric in self.metrics), "instances of pcsim.metrics.Metric"
        yield "callbacks", all(isinstance(c, Callback) for c in self.callbacks), "instances of pcsim.callbacks.Callback"
        yield "clip", self.clip is None or (is_number(self.clip) and self.clip > 0), "a number above 0, or None"
        yield "clip_by", self.clip_by in ("norm", "value"), "'norm' or 'value'"
        yield "clip_by", self.clip is not None or self.clip_by == "norm", "a size at which to clip beside it, clip="
        yield "relaxed_every", _whole(self.relaxed_every, 1), "a whole number of at least 1"
        yield "seed", self.seed is None or _whole(self.seed, 0), "a whole number of at least 0, or None"


def warmup_cosine(
    optimizer: Optimizer, steps: int, *, warmup: float = 0.1, peak: float = 1.1, end: float = 0.1
) -> LambdaLR:
    """The schedule of the paper's experiments, to be stepped after every batch (arXiv 2506.23800; SPEC §9).

    The learning rate rises linearly from the optimizer's own to ``peak`` times it, and falls along a half cosine to
    ``end`` times it.

    Args:
        optimizer: as it starts.
        steps: batches of the whole run, at least 1.
        warmup: share of the steps that it rises, 0 to 1.
        peak: ≥ 0.
        end: ≥ 0.

    Raises:
        SettingError: a number is out of its range.
    """
    if not _whole(steps, 1) or not 0 <= warmup <= 1 or min(peak, end) < 0:
        raise SettingError(
            f"warmup_cosine: steps={steps!r}, warmup={warmup}, peak={peak}, end={end} given, expected at least one "
            "step, a share from 0 to 1, and factors of at least 0"
        )
    rising = warmup * steps

    def factor(step: int) -> float:
        if step < rising:
            return 1 + (peak - 1) * step / rising
        fallen = min(1.0, (step - rising) / max(1.0, steps - rising))
        return end + (peak - end) * (1 + math.cos(math.pi * fallen)) / 2

    return LambdaLR(optimizer, factor)


def _whole(number: object, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def _check_loader(part: str, batches: object, *, repeated: bool) -> None:
    given = f"{part}: {type(batches).__name__} given"
    if not isinstance(batches, Iterable):
        raise SettingError(f"{given}, expected batches, such as a DataLoader or a list of pairs")
    if repeated and isinstance(batches, Iterator):
        raise SettingError(f"{given}, which is used up after one epoch; give a DataLoader or a list")
    if length_hint(batches, 1) == 0:
        raise SettingError(f"{given} without batches, expected at least one")


@contextmanager
def _evaluating(network: Network) -> Iterator[None]:
    """Evaluation mode, and random draws that leave no trace."""
    with in_mode(network, training=False), random_state_kept():
        yield
