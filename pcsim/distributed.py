"""Several processes that train together by torch.distributed: each learns from a share of every batch.

A batch is divided, and the gradients are averaged over its samples, so that N processes do what one does with the whole
batch: the batch size, the learning rate and the steps of an epoch stay as they are, whatever N is.

Whatever processes do together is preceded by an exchange of a few flags (:meth:`Processes.agree`). A process that fails
takes part in one exchange more and says so there, and then nobody waits for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import length_hint
from typing import Any, NoReturn, TypeVar

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from pcsim import errors
from pcsim.clamps import Given, Stream
from pcsim.errors import PCError, ProcessError, SettingError

Kind = TypeVar("Kind")

RANKS_APART = 7_368_787
"""Seeds of the draws of two neighbouring processes are so far apart; another prime than that between epochs."""
SECONDS_FOR_THE_LAUNCHER = 3.0
"""What a process whose neighbour is gone waits before it ends, so that a launcher meets the one that failed first."""


class Processes:
    """The processes of a group, as one of them sees them; a single one where torch.distributed is not initialised.

    Args:
        group: None for the default group.

    Raises:
        SettingError: this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        there = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if there else 0
        self.size = dist.get_world_size(group) if there else 1
        if self.rank < 0:
            raise SettingError("Trainer.process_group: this process is not in the group; give it one that it is in")
        self._channel: dist.ProcessGroup | None = None
        self._depth = 0
        self._over = self._broken = False
        self._alike: Tensor | None = None

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that shows and writes."""
        return self.rank == 0

    # Agreement

    @contextmanager
    def together(self) -> Iterator[None]:
        """What all processes do; an exception in one of them ends it in all, with its message.

        Where it is one of pcsim's, the others raise one of the same class, so that they all go on alike.
        """
        if self.alone:
            yield
            return
        if not self._depth:
            self._over = False
            self._open_channel()
        self._depth += 1
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise
        finally:
            self._depth -= 1

    @property
    def over(self) -> bool:
        """Whether all know that one of them has failed."""
        return self._over

    def agree(self, *, stop: bool = False, more: bool = True) -> tuple[bool, bool]:
        """Whether somebody wants to stop, and whether all have a further batch.

        Raises:
            PCError: a process has failed, or is gone.
            SettingError: some have a further batch, and some have none.
        """
        if self.alone:
            return stop, more
        failed, stopping, some, none = self._exchange(0, stop, more, not more)
        if failed:
            self._fail(self.size - failed)
        if some and none:
            self._over = True
            raise SettingError(
                f"rank {self.rank} of {self.size} processes has {'a' if more else 'no'} further batch, and others have "
                f"{'none' if more else 'one'}; give every process the same batches (each takes its share of them), or "
                "as many"
            )
        return bool(stopping), bool(some)

    def _exchange(self, *flags: int) -> list[int]:
        """The largest of each flag over all processes."""
        largest = torch.tensor([int(flag) for flag in flags])
        with self._reaching():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._channel)
        return [int(flag) for flag in largest.tolist()]

    def _tell(self, error: BaseException) -> None:
        if self._over or self._broken:
            return
        self._over = True
        told = str(error) if isinstance(error, PCError) else f"{type(error).__name__}: {error}"
        if isinstance(error, PCError):
            error.args = (f"rank {self.rank} of {self.size} processes: {told}", *error.args[1:])
        try:
            lowest = self.size - self._exchange(self.size - self.rank, 0, 0, 0)[0]
            self._hear(lowest, (type(error).__name__, told))
        except PCError:  # the others are gone as well
            return

    def _fail(self, rank: int) -> NoReturn:
        self._over = True
        name, told = self._hear(rank, ("", ""))
        kind = getattr(errors, name, None)
        known = isinstance(kind, type) and issubclass(kind, PCError)
        message = f"rank {rank} of {self.size} processes: {told}"
        raise (kind if known and kind is not None else ProcessError)(message) from ProcessError(
            f"raised by rank {rank}, not by this one, which is rank {self.rank}"
        )

    def _hear(self, rank: int, own: Kind) -> Kind:
        """What one process says, in all."""
        said = [own]
        with self._reaching():
            dist.broadcast_object_list(said, src=self._global(rank), group=self._channel)
        return said[0]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """What needs the others; its exceptions say that one is gone."""
        gone = f"rank {self.rank} of {self.size} processes: another process is gone; its own message, or that of the "
        gone += "launcher, says which and why"
        if self._broken:
            raise ProcessError(gone)
        try:
            yield
        except RuntimeError as error:  # the back-ends raise nothing narrower
            self._over = self._broken = True
            time.sleep(SECONDS_FOR_THE_LAUNCHER)
            raise ProcessError(f"{gone} ({str(error).splitlines()[0]})") from error

    def _open_channel(self) -> None:
        """Flags and messages go by the CPU, where nobody waits for a device."""
        if self._channel is None:
            own = self.group if self.group is not None else dist.group.WORLD
            assert own is not None
            if "cpu:gloo" in dist.get_backend_config(own):
                self._channel = own
            else:
                self._channel = dist.new_group(dist.get_process_group_ranks(own), backend="gloo")

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    # What is the same in all

    def from_first(self, own: Callable[[], Kind]) -> Kind:
        """What the first process makes, in all of them; its tensors are on the CPU."""
        if self.alone:
            return own()
        mine: Any = _on_cpu(own()) if self.first else None
        self.agree()
        heard: Kind = self._hear(0, mine)
        return heard

    def gather(self, own: Kind) -> list[Kind]:
        """What each process has, plain values, by rank."""
        if self.alone:
            return [own]
        self.agree()
        found: list[Any] = [None] * self.size
        with self._reaching():
            dist.all_gather_object(found, own, group=self._channel)
        return found

    def average_gradients(self, parameters: Iterable[nn.Parameter], samples: int) -> None:
        """Replace each gradient, a mean over this process's samples, by the mean over those of all processes.

        Which parameters have one follows from graph, clamps and rule (SPEC §7), and so is the same in all processes.

        Args:
            parameters: the network's, in its order.
            samples: how many this process has; 0 where it only keeps step with the others.

        Raises:
            SettingError: a gradient is sparse.
            PCError: a process has failed, or is gone.
        """
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                if parameter.grad.layout is not torch.strided:
                    raise SettingError(
                        f"a gradient of layout {parameter.grad.layout} cannot be averaged over processes; use dense "
                        "ones, such as those of nn.Embedding(sparse=False)"
                    )
                kinds.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter)
        self.agree()
        for same in kinds.values():
            gradients = [parameter.grad for parameter in same if parameter.grad is not None]
            flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), gradients[0].new_ones(1)])
            flat.mul_(samples)
            with self._reaching():
                dist.all_reduce(flat, group=self.group)
            flat.div_(flat[-1].clone())
            parts = torch.split(flat[:-1], [gradient.numel() for gradient in gradients])
            for parameter, gradient, part in zip(same, gradients, parts, strict=True):
                parameter.grad = torch.empty_like(gradient).copy_(part.view_as(gradient))

    def average_buffers(self, module: nn.Module) -> None:
        """Let all have the same buffers: running statistics are averaged, whole numbers are those of the first."""
        buffers = [buffer for buffer in module.buffers() if buffer.numel()]
        if self.alone or not buffers:
            return
        self.agree()
        with torch.no_grad(), self._reaching():
            for buffer in buffers:
                same = buffer.detach().contiguous()
                if buffer.is_floating_point():
                    dist.all_reduce(same, group=self.group)
                    same /= self.size
                else:
                    dist.broadcast(same, src=self._global(0), group=self.group)
                buffer.copy_(same)

    # Random draws

    def seed(self, seed: int) -> None:
        """Let all draw what they must draw alike from one seed, such as the order of samples, and the rest apart."""
        torch.manual_seed(seed)
        if not self.alone:
            self._alike = torch.get_rng_state()
            torch.manual_seed((seed + (self.rank + 1) * RANKS_APART) % 2**63)

    @contextmanager
    def drawing_alike(self) -> Iterator[None]:
        """What is drawn inside, by torch's generator of the CPU, is the same in all processes."""
        assert self._alike is not None
        own = torch.get_rng_state()
        torch.set_rng_state(self._alike)
        try:
            yield
        finally:
            self._alike = torch.get_rng_state()
            torch.set_rng_state(own)

    @contextmanager
    def draws_put_back(self) -> Iterator[None]:
        """What is drawn alike inside leaves no trace; it begins as in the first process where nothing was yet."""
        before = self._alike
        if not self.alone and before is None:
            self._alike = self.from_first(torch.get_rng_state)
        try:
            yield
        finally:
            self._alike = before

    # Shares

    def divide(self, batches: Iterable[Any]) -> Shares:
        """The share of every batch that is this process's.

        Raises:
            SettingError: a ``DistributedSampler`` divides by another number of processes.
        """
        if self.alone:
            return Shares(batches, self, divided=True)
        sampler = _distributed_sampler(batches)
        if sampler is not None:
            if (sampler.num_replicas, sampler.rank) != (self.size, self.rank):
                raise SettingError(
                    f"a DistributedSampler for rank {sampler.rank} of {sampler.num_replicas} given, expected rank "
                    f"{self.rank} of {self.size}; leave it out, since Trainer divides batches itself"
                )
            return Shares(batches, self, divided=True, sampler=sampler)
        if type(batches) is not DataLoader or isinstance(batches.dataset, IterableDataset):
            return Shares(batches, self)
        if batches.batch_sampler is not None:
            indices = ShareOfIndices(batches.batch_sampler, batches.generator, self)
            return Shares(_loading(batches, batch_sampler=indices), self, divided=True, indices=indices)
        if isinstance(batches.sampler, BatchSampler):
            indices = ShareOfIndices(batches.sampler, batches.generator, self)
            return Shares(_loading(batches, batch_size=None, sampler=indices), self, divided=True, indices=indices)
        return Shares(batches, self)

    def share(self, whole: Sequence[Kind]) -> tuple[Sequence[Kind], int]:
        """Every size-th sample from the rank-th on, as a DistributedSampler takes them, and how many count.

        A process that is left without one takes the first, which then counts nothing, to keep step with the others.
        """
        own = whole[self.rank :: self.size]
        return (own, len(own)) if len(own) else (whole[:1], 0)


@attrs.define(eq=False)
class Shares:
    """A process's share of every batch of an iterable.

    Args:
        batches: what is iterated.
        processes: who shares.
        divided: whether these are shares already; otherwise whole batches are loaded, and cut.
        indices: what divides them, where each process loads its own samples only.
        sampler: that of a user who divides them.
    """

    batches: Iterable[Any]
    processes: Processes
    divided: bool = False
    indices: ShareOfIndices | None = None
    sampler: DistributedSampler[Any] | None = None

    def __length_hint__(self) -> int:
        return length_hint(self.batches)

    def clamps(self, epoch: int, clamp: Callable[[Any], dict[str, Given]]) -> Iterator[tuple[dict[str, Given], int]]:
        """Clamps of each share, and how many samples it counts for.

        Args:
            epoch: by which a ``DistributedSampler`` shuffles.
            clamp: makes clamps of a batch.
        """
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)
        for batch in self.batches if self.divided else self._whole():
            clamps = clamp(batch)
            if not self.divided:
                yield self._cut(clamps)
            elif self.indices is not None:
                yield clamps, self.indices.counts.popleft()
            else:
                yield clamps, _size(clamps)

    def _whole(self) -> Iterator[Any]:
        """Whole batches; whatever their order is drawn by, all processes see the same ones."""
        with self.processes.drawing_alike():
            iterator = iter(self.batches)
        while True:
            with self.processes.drawing_alike():
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def _cut(self, clamps: dict[str, Given]) -> tuple[dict[str, Given], int]:
        numbers, counted = self.processes.share(range(_size(clamps)))
        if not numbers:
            return clamps, 0  # an empty batch, which the simulator refuses by name
        cut = slice(numbers[0], numbers[-1] + 1, self.processes.size)
        return {name: _rows(given, cut) for name, given in clamps.items()}, counted


class ShareOfIndices(Sampler[list[int]]):
    """Of every batch of a sampler the indices that one process loads.

    Args:
        batches: lists of indices.
        generator: the loader's; None for torch's own.
        processes: who shares.
    """

    def __init__(self, batches: Iterable[list[int]], generator: torch.Generator | None, processes: Processes) -> None:
        self.batches, self.generator, self.processes = batches, generator, processes
        self.counts: deque[int] = deque()
        """How many samples of each share count that was drawn and not yet used."""

    def __len__(self) -> int:
        return length_hint(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        with self.processes.drawing_alike():
            # A loader draws a seed for its workers first: so the order is that of one process with the whole batch.
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)
            whole = list(self.batches)
        self.counts.clear()
        for batch in whole:
            share, counted = self.processes.share(list(batch))
            self.counts.append(counted)
            yield list(share)


def _distributed_sampler(batches: Iterable[Any]) -> DistributedSampler[Any] | None:
    part: object = batches
    while part is not None:
        if isinstance(part, DistributedSampler):
            return part
        part = getattr(part, "batch_sampler", None) or getattr(part, "sampler", None)
    return None


def _loading(loader: DataLoader[Any], **indices: Any) -> DataLoader[Any]:
    """The same loader with other indices."""
    kept = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
    settings = {name: getattr(loader, name) for name in (*kept, "prefetch_factor", "persistent_workers")}
    return DataLoader(loader.dataset, **indices, **settings)


def _size(clamps: Mapping[str, Given]) -> int:
    some = next(iter(clamps.values()))
    value = some[0] if isinstance(some, tuple) else some
    value = value.first if isinstance(value, Stream) else value
    # What is no batch at all is refused by name where it is clamped.
    return len(value) if isinstance(value, Tensor) and value.dim() else 0


def _rows(given: Given, rows: slice) -> Given:
    if isinstance(given, Stream):
        return given.rows(rows)
    if isinstance(given, Tensor):
        return given[rows]
    value, mask = given
    first = value.first if isinstance(value, Stream) else value
    some = value.rows(rows) if isinstance(value, Stream) else value[rows]
    return some, mask[rows] if mask.dim() == first.dim() else mask


def _on_cpu(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().cpu()
    if isinstance(tree, Mapping):
        return {key: _on_cpu(part) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_on_cpu(part) for part in tree)
    return tree
