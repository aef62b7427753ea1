"""Runs that a device plays back: it has captured their operations, so that none has to be queued anew.

CUDA calls what it has captured a graph. It computes with what lies at the same places as when it was captured, and is
captured again where a parameter lies elsewhere since.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Protocol, TypeAlias

import attrs
import torch
from torch import Tensor, nn

from pcsim.engine.batched.gradients import Found
from pcsim.engine.batched.places import Arena, Cell, where
from pcsim.engine.kernels.kernel import Saved
from pcsim.engine.problem import Batch, Gradients
from pcsim.errors import PCWarning


class DeviceGraph(Protocol):
    """Operations of a device, in the order in which they are to be computed."""

    def capture(self, work: Callable[[], object]) -> None:
        """Call ``work``, whose operations are captured instead of computed; RuntimeError where one cannot be."""

    def replay(self) -> None:
        """Compute what was captured."""


class CudaGraph:
    """A graph of CUDA's.

    Args:
        device: that captures.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._graph = device, torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], object]) -> None:
        """Call ``work``; other threads, such as those that load data, may go on meanwhile."""
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        """Compute what was captured."""
        self._graph.replay()


GRAPHS: dict[str, Callable[[torch.device], DeviceGraph]] = {"cuda": CudaGraph}
"""What captures, by type of device."""


@attrs.frozen(eq=False)
class _Captured:
    """A stage of a run.

    Args:
        graph: its operations.
        gradients: that they find.
        cells: what they leave in cells that are not fixed.
        saved: what kernels keep of it.
        later: stages that read what this one leaves.
    """

    graph: DeviceGraph
    gradients: Gradients
    cells: list[tuple[Cell, Tensor | None]]
    saved: list[tuple[Saved, Saved]]
    later: _Stages = attrs.field(factory=dict, init=False)


_Stages: TypeAlias = dict[Hashable, _Captured]


class Playback:
    """The stages of a program's runs, each of them captured the second time that it runs.

    Args:
        arena: where what operations leave lies.
        found: where gradients go.
        network: whose parameters and buffers they read.
        asked: whether anybody wants it.
    """

    def __init__(self, arena: Arena, found: Found, network: nn.Module, *, asked: bool) -> None:
        self._arena, self._found, self.asked = arena, found, asked
        self.refused = "" if asked else "nobody has asked for it"
        """Why nothing is captured; "" where it is."""
        owners = () if self.refused else (owner for m in network.modules() for owner in (m._parameters, m._buffers))
        self._owners = [owner for owner in owners if owner]
        self._held: dict[Hashable, Tensor] = {}
        self._addresses: list[object] = []
        self._called: set[Hashable] = set()
        self._captured: _Stages = {}
        self._latest: _Captured | None = None

    def hold(self, batch: Batch) -> Batch:
        """The same batch, with all that operations read of it during a run in tensors that stay where they are."""
        clamps = {
            name: clamp
            if clamp.mask is None
            else attrs.evolve(clamp, value=self._keep((name, "value"), clamp.value), mask=self._keep(name, clamp.mask))
            for name, clamp in batch.clamps.items()
        }
        precision = {name: self._keep((name, "precision"), own) for name, own in batch.precision.items()}
        return attrs.evolve(batch, clamps=clamps, precision=precision)

    def _keep(self, key: Hashable, tensor: Tensor) -> Tensor:
        kept = self._held.get(key)
        if kept is None or kept.shape != tensor.shape:
            kept = self._held[key] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return kept.copy_(tensor)

    def run(self, stage: Hashable, work: Callable[[], object]) -> None:
        """Do the work of a run's first stage, which reads nothing that an earlier one has left."""
        if self.refused:
            self._latest = None
            work()
            return
        addresses = self._places()
        if addresses != self._addresses:
            self._captured.clear()
            self._addresses = addresses
        self._latest = self._play(stage, work, self._captured)

    def go_on(self, stage: Hashable, work: Callable[[], object]) -> None:
        """Do the work of a stage that reads what the first one has left."""
        if self.refused or self._latest is None or self._places() != self._addresses:
            work()
            self._called.add(stage)
        else:
            self._play(stage, work, self._latest.later)

    def _places(self) -> list[object]:
        """Where in memory, and how, lies what operations read that may be put elsewhere."""
        tensors = (tensor for owner in (*self._owners, self._held) for tensor in owner.values())
        return [where(tensor) for tensor in tensors if tensor is not None]

    def _play(self, stage: Hashable, work: Callable[[], object], captured: _Stages) -> _Captured | None:
        """Call by call the first time, in which libraries set themselves up; None where it was not played."""
        if stage in self._called and stage not in captured:
            self._capture(stage, work, captured)
        self._called.add(stage)
        if stage not in captured:
            work()
            return None
        played = captured[stage]
        played.graph.replay()
        for cell, left in played.cells:
            cell.tensor = left
        for saved, kept in played.saved:
            saved.update(kept)
        self._found.update(_copies(played.gradients))
        return played

    def _capture(self, stage: Hashable, work: Callable[[], object], captured: _Stages) -> None:
        graph = GRAPHS[self._arena.device.type](self._arena.device)
        try:
            graph.capture(work)
        except RuntimeError as error:
            self.refuse(f"an operation cannot be captured: {str(error).splitlines()[0]}")
        else:
            cells = [(cell, cell.tensor) for cell in self._arena.all_of(Cell) if not cell.fixed]
            saved = [(kept, dict(kept)) for kept in self._arena.all_of(dict)]
            captured[stage] = _Captured(graph, self._found.copy(), cells, saved)
        finally:
            self._found.clear()

    def refuse(self, why: str) -> None:
        """Capture nothing, and say why."""
        self.refused = why
        self._captured.clear()
        warnings.warn(f"cuda_graphs: operations are queued one by one, since {why}", PCWarning, stacklevel=2)


def _copies(gradients: Gradients) -> Gradients:
    """Gradients in tensors of the caller's own; those that lie in one, as of a stack, are copied together."""
    copies, wholes = dict[nn.Parameter, Tensor](), dict[int, torch.UntypedStorage]()
    for parameter, gradient in gradients.items():
        there = gradient.untyped_storage()
        if there.data_ptr() not in wholes:
            wholes[there.data_ptr()] = there.clone()  # type: ignore[no-untyped-call]
        own = gradient.new_empty(0)
        own.set_(wholes[there.data_ptr()], gradient.storage_offset(), gradient.shape, gradient.stride())
        copies[parameter] = own
    return copies
