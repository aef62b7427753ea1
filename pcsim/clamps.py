"""What is given for a run, read and checked before any work starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import attrs
import torch
from torch import Tensor

from pcsim.engine.probe import Probe
from pcsim.engine.problem import Clamp, Unread
from pcsim.errors import ClampError, SettingError
from pcsim.graph import checks
from pcsim.graph.fingerprint import Fingerprint
from pcsim.graph.network import Network
from pcsim.graph.node import Node
from pcsim.messages import axis_to_mend, instead_of, listed

INTEGERS = torch.int64, torch.int32
"""Dtypes of integers that a node may be given; both are computed with as the first."""


@attrs.frozen(eq=False)
class Stream:
    """A clamp that changes while the network relaxes: a frame for every inference step, or for every few.

    Step t sees frame ⌊t / every⌋, and so does the start the first; after the last step the last frame stays. The start,
    and with it what :class:`ForwardUpdate` learns from, is that of the first frame.

    Args:
        frames: (frames, batch, *shape), frames · every being the steps of the relaxation; or a function from the step,
            0 first, to (batch, *shape), called for every frame before any work starts.
        every: inference steps for which each frame stays, ≥ 1.

    Raises:
        SettingError: an argument is none of these.
    """

    frames: Tensor | Callable[[int], Tensor]
    every: int = attrs.field(default=1, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise SettingError(f"Stream: every={self.every!r} given, expected a number of steps of at least 1")
        if not (isinstance(self.frames, Tensor) or callable(self.frames)):
            mend = instead_of(self.frames, Tensor, "stack the frames along a first axis (torch.stack)")
            raise SettingError(
                f"Stream: frames of type {type(self.frames).__name__} given, expected a tensor (frames, batch, *shape) "
                f"or a function from the step to (batch, *shape); {mend}"
            )

    @property
    def first(self) -> Tensor:
        """What is given at first, (batch, *shape)."""
        return self.frames[0] if isinstance(self.frames, Tensor) else self.frames(0)

    def rows(self, rows: slice) -> Stream:
        """The same of some samples."""
        frames = self.frames
        some = frames[:, rows] if isinstance(frames, Tensor) else lambda step: frames(step)[rows]
        return attrs.evolve(self, frames=some)

    def over(self, name: str, steps: int) -> list[Tensor]:
        """All frames of so many steps, each (batch, *shape); ClampError where there are more or fewer."""
        if isinstance(self.frames, Tensor):
            count = len(self.frames) if self.frames.dim() else 0
            if count == 0 or count * self.every != steps:
                raise ClampError(
                    f"clamp {name!r}: a stream of {count} frames, {self.every} steps each, given, but the relaxation "
                    f"takes {steps}; give steps / every frames, one first axis for all"
                )
            return list(self.frames)
        if not steps or steps % self.every:
            raise ClampError(
                f"clamp {name!r}: a stream of frames for {self.every} steps each given, but the relaxation takes "
                f"{steps}, which is no multiple of it"
            )
        return [self.frames(step) for step in range(0, steps, self.every)]


One = Tensor | Stream
Given = One | tuple[One, Tensor]
Clamps = Mapping[str, Given] | Mapping[Node, Given] | Mapping[str | Node, Given]
"""What is given, by node or its name: (batch, *shape) or a stream of it, or a pair of that and a boolean mask of the
given units."""
Recorded = bool | str | Node | Probe | Iterable[bool | str | Node | Probe]
"""What may be recorded: energies of all nodes, and what of single nodes."""


def read(
    network: Network,
    clamps: Clamps,
    fingerprint: Fingerprint,
    steps: int | str,
    size: int | None = None,
) -> tuple[dict[str, Clamp], Tensor, Unread | None]:
    """What is given, by node name; a tensor of its batch and device, and the dtype of all values but integers; and
    whether what is given is finite and in its range, where that is still to be read from the device.

    On a CPU, where reading costs nothing, what is not is refused at once.

    Args:
        network: whose nodes are clamped.
        clamps: as the user gave them.
        fingerprint: of the network.
        steps: of the relaxation, or why nothing can change within it.
        size: number of samples, where nothing has to be given that says so.

    Raises:
        ClampError: a clamp does not fit, or a node of integers has none; names the node.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ClampError(f"batch={size!r} given, expected a whole number of samples, at least 1")
    named, streams = _shown(_by_name(network, clamps), steps)
    values = (given[0] if isinstance(given, tuple) and given else given for given in named.values())
    some = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
    dtype, device = fingerprint.tensor_options or network.tensor_options(otherwise=some)
    late = not all(map(reads_freely, fingerprint.devices(device)))
    whole = _all_integers(network, named, streams, fingerprint.integers, device)
    fits = {
        name: whole[name].clamp(late) if name in whole else _clamp(network, name, given, dtype, device, late)
        for name, given in named.items()
    }
    for name, (frames, every) in streams.items():
        if name not in whole:
            fits[name] = _streamed(network, name, fits[name], frames, every, late)
    if not fits:
        return {}, torch.empty(_free_size(network, size), dtype=dtype, device=device), None
    sizes = {name: len(clamp.value) for name, clamp in fits.items()}
    batch = next(iter(sizes.values()))
    for name, own in sizes.items():
        if own != batch:
            raise ClampError(
                f"clamp {name!r}: batch of {own} given, but {next(iter(sizes))!r} has {batch}; clamp all nodes with "
                "the same number of samples"
            )
    if size not in (None, batch):
        raise ClampError(f"batch={size} given, but {next(iter(sizes))!r} is clamped for {batch}; leave out batch=")
    like = next((clamp.value for clamp in fits.values() if clamp.value.is_floating_point()), None)
    if like is None or like.device != device:  # whatever is clamped first, what is summed over nodes lies in one place
        like = torch.empty(batch, dtype=dtype, device=device)
    return fits, like, _unread(fits, whole, dtype) if late else None


def _free_size(network: Network, size: int | None) -> int:
    """How many samples there are where nothing is clamped, which then follow from priors alone."""
    if size is None:
        raise ClampError(
            "nothing is clamped, so the batch size is unknown; clamp at least one node, or give infer(batch=)"
        )
    loose = [node.name for node in network.roots() if node.prior is None]
    if loose:
        raise ClampError(
            f"nothing is clamped, and root {loose[0]!r} has no prior, so that nothing says what it could be; give it a "
            "prior, or clamp it"
        )
    return size


def _shown(
    named: Mapping[str, Given], steps: int | str
) -> tuple[dict[str, Given], dict[str, tuple[list[Tensor], int]]]:
    """What is given at first, and of streams all frames with the steps that each lasts."""
    first: dict[str, Given] = {}
    streams: dict[str, tuple[list[Tensor], int]] = {}
    for name, given in named.items():
        value, *rest = given if isinstance(given, tuple) and given else (given,)
        first[name] = given
        if isinstance(value, Stream):
            if isinstance(steps, str):
                raise ClampError(f"clamp {name!r}: a stream given, but {steps}; clamp one tensor (batch, *shape)")
            frames = value.over(name, steps)
            streams[name] = frames, value.every
            first[name] = (frames[0], *rest) if rest else frames[0]  # type: ignore[assignment]
    return first, streams


def _streamed(network: Network, name: str, first: Clamp, frames: list[Tensor], every: int, late: bool) -> Clamp:
    """A clamp with all its frames, each of the shape of the first."""
    shape, dtype, device = network.nodes[name].shape, first.value.dtype, first.value.device
    checked = [_value(name, frame, shape, dtype, device).detach() for frame in frames]
    sizes = {len(frame) for frame in checked}
    if len(sizes) > 1:
        raise ClampError(f"clamp {name!r}: frames of {sorted(sizes)} samples given, expected the same number in each")
    whole = torch.stack(checked)
    if first.mask is not None:
        whole = torch.where(first.mask | torch.isfinite(whole), whole, 0)
    if not late and not bool(torch.isfinite(whole).all()):
        raise _unfinite(name, masked=first.mask is not None)
    return attrs.evolve(first, value=whole[0], frames=whole, every=every)


def read_precision(
    network: Network, precision: Mapping[str | Node, Tensor], first: Tensor, unread: Unread | None
) -> tuple[dict[str, Tensor], Unread | None]:
    """Nodes' own precisions trial by trial, (batch, *shape) or (batch, 1, ...), and what is still to be read.

    Args:
        network: whose nodes they are.
        precision: as the user gave it.
        first: a tensor of the batch, dtype and device of what is given beside it.
        unread: of those; None where all is read at once.

    Raises:
        ClampError: a precision does not fit, or its node has none; names the node.
    """
    found = {}
    for name, value in _by_name(network, precision, "precision").items():
        node = network.nodes[name]
        if not node.predicted or node.deterministic or node.log_precision is not None:
            why = "learns its own" if node.log_precision is not None else "has no error of its own to weigh"
            raise ClampError(f"precision {name!r}: the node {why}; leave it out")
        if isinstance(value, Tensor) and value.dim() == 1:
            value = value.view(-1, *[1] * len(node.shape))
        alone = isinstance(value, Tensor) and tuple(value.shape[1:]) == (1,) * len(node.shape)
        shape, where = (1,) * len(node.shape) if alone else node.shape, node.device or first.device
        given = _value(name, value, shape, first.dtype, where, "precision")
        if len(given) != len(first):
            raise ClampError(
                f"precision {name!r}: batch of {len(given)} given, expected {len(first)}, as of the clamps"
            )
        checks.energy(node, node.energy_function, per_unit=not alone)
        found[name] = given.detach()

    def refuse() -> None:
        for name, value in found.items():
            if not bool(((value >= 0) & torch.isfinite(value)).all()):
                raise ClampError(f"precision {name!r}: holds a negative number, NaN or infinity; give at least 0")

    sizes = (torch.where(value >= 0, value, math.nan).sum() for value in found.values())
    return found, _beside(unread, sizes, refuse)


def with_constants(network: Network, clamps: dict[str, Clamp], first: Tensor) -> dict[str, Clamp]:
    """What is given, and the constant nodes that are not, for the batch and dtype of a tensor, where each lies."""
    for name, constant in network.constants.items():
        if name not in clamps:
            node = network.nodes[name]
            value = first.new_full((len(first), *node.shape), constant, device=node.device or first.device)
            clamps[name] = Clamp(value)
    return clamps


def reads_freely(device: torch.device) -> bool:
    """Whether reading a number waits for nothing."""
    return device.type == "cpu"


def _unread(fits: Mapping[str, Clamp], whole: Mapping[str, _Integers], dtype: torch.dtype) -> Unread:
    def refuse() -> None:
        for name, clamp in fits.items():
            if name in whole:
                whole[name].refuse()
            elif not bool(torch.isfinite(_all_of(clamp)).all()):
                raise _unfinite(name, masked=clamp.mask is not None)

    sizes = (whole[n].size(dtype) if n in whole else _all_of(clamp).sum().abs() for n, clamp in fits.items())
    return Unread(tuple(sizes), refuse)


def _all_of(clamp: Clamp) -> Tensor:
    return clamp.value if clamp.frames is None else clamp.frames


@attrs.frozen(eq=False)
class _Integers:
    """Integers that are given of a node, to be looked at now or late.

    Args:
        name: of the node.
        value: (batch, *shape), or of a stream (frames, batch, *shape), int64.
        count: how many integers the node may hold, from 0 on.
        every: steps for which each frame of a stream stays; None where there is none.
    """

    name: str
    value: Tensor
    count: int
    every: int | None = None

    def clamp(self, late: bool) -> Clamp:
        """What the run is given: on a device, where looking is late, what is out of range is brought into it, since
        reading an embedding beyond its end would end the process.
        """
        if not late:
            self.refuse()
        value = self.value.clamp(0, self.count - 1) if late else self.value
        return Clamp(value) if self.every is None else Clamp(value[0], frames=value, every=self.every)

    def size(self, dtype: torch.dtype) -> Tensor:
        """0-d, 0 where all are in range, else infinite."""
        outside = (self.value.amin() < 0) | (self.value.amax() >= self.count)
        return outside.new_zeros((), dtype=dtype).masked_fill_(outside, math.inf)

    def refuse(self) -> None:
        """ClampError where one is out of range."""
        low, high = (int(end) for end in self.value.aminmax())
        if low < 0 or high >= self.count:
            raise ClampError(
                f"clamp {self.name!r}: integers from {low} to {high} given, expected 0 to {self.count - 1}; number "
                "them from 0, or give its edges a larger num_embeddings"
            )


def _all_integers(
    network: Network,
    named: Mapping[str, Given],
    streams: Mapping[str, tuple[list[Tensor], int]],
    counts: Mapping[str, int],
    device: torch.device,
) -> dict[str, _Integers]:
    """What is given of the nodes that hold integers, all of which have to be given, in whole."""
    whole = {}
    for name, count in counts.items():
        if name not in named or isinstance(named[name], tuple):
            given = "a mask is given" if name in named else "nothing is given"
            raise ClampError(
                f"clamp {name!r}: {given}, but the node holds integers from 0 to {count - 1}, which nothing infers; "
                "clamp all of it"
            )
        frames, every = streams.get(name, ([named[name]], None))
        node = network.nodes[name]
        values = [_integers(name, frame, node.shape, node.device or device) for frame in frames]
        whole[name] = _Integers(name, values[0] if every is None else torch.stack(values), count, every)
    return whole


def _integers(name: str, given: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    dtype = given.dtype if isinstance(given, Tensor) and given.dtype in INTEGERS else torch.long
    return _value(name, given, shape, dtype, device).detach().long()


def _unfinite(name: str, *, masked: bool) -> ClampError:
    if masked:
        return ClampError(f"clamp {name!r}: a given unit is NaN or infinite; clean the data, or mask it as well")
    return ClampError(f"clamp {name!r}: holds NaN or infinity; clean the data, or mask the unknown units")


def read_start(
    network: Network,
    start: Mapping[str | Node, Tensor],
    clamps: Mapping[str, Clamp],
    like: Tensor,
    unread: Unread | None,
) -> tuple[dict[str, Tensor], Unread | None]:
    """Where free nodes start, by node name, and what is still to be read, as of :func:`read`.

    Args:
        network: whose nodes they are.
        start: as the user gave it.
        clamps: what is given beside it.
        like: of its batch, dtype and device.
        unread: of those; None where all is read at once.

    Raises:
        ClampError: a value does not fit, or its node is none that moves; names the node.
    """
    found = {}
    for name, value in _by_name(network, start, "init").items():
        node = network.nodes[name]
        full = name in clamps and clamps[name].mask is None
        if full or node.deterministic:
            why = "is clamped" if full else "is deterministic, so that its value is its prediction"
            raise ClampError(f"init {name!r}: the node {why}; leave it out")
        where = node.device or like.device
        found[name] = _value(name, value, node.shape, like.dtype, where, "init").detach()
        if len(found[name]) != len(like):
            other = f"{next(iter(clamps))!r} is clamped for" if clamps else "batch is"
            raise ClampError(
                f"init {name!r}: batch of {len(found[name])} given, but {other} {len(like)}; give the same number of "
                "samples"
            )

    def refuse() -> None:
        for name, value in found.items():
            if not bool(torch.isfinite(value).all()):
                raise ClampError(f"init {name!r}: holds NaN or infinity; give finite values")

    return found, _beside(unread, (value.sum().abs() for value in found.values()), refuse)


def _beside(unread: Unread | None, sizes: Iterable[Tensor], refuse: Callable[[], None]) -> Unread | None:
    """What is to be read with what is read late; where nothing is, it is looked at now."""
    if unread is None:
        refuse()
        return None

    def refuse_each() -> None:
        unread.refuse()
        refuse()

    return Unread((*unread.sizes, *sizes), refuse_each)


def _by_name(network: Network, clamps: Clamps, kind: str = "clamp") -> dict[str, Given]:
    if not isinstance(clamps, Mapping) or not all(isinstance(node, str | Node) for node in clamps):
        what = "clamps" if kind == "clamp" else kind
        raise ClampError(
            f"{what}: {type(clamps).__name__} given, expected a dictionary from nodes or their names to tensors, such "
            "as {'input': images, 'output': targets}"
        )
    named = {}
    for node, given in clamps.items():
        name = node if isinstance(node, str) else node.name
        if not isinstance(node, str) and node not in network:
            raise ClampError(f"{kind} {name!r}: that node belongs to another network; pass this one's, or its name")
        if name in named:
            raise ClampError(f"{kind} {name!r}: given twice, by name and by node; give it once")
        if name not in network.nodes:
            raise ClampError(f"{kind} {name!r}: no such node; the network has {listed(network.nodes)}")
        named[name] = given
    return named


def _clamp(network: Network, name: str, given: Given, dtype: torch.dtype, device: torch.device, late: bool) -> Clamp:
    known = network.nodes
    if isinstance(given, tuple) and len(given) != 2:
        raise ClampError(f"clamp {name!r}: a tuple of {len(given)} given, expected a pair of values and a mask")
    value, mask = given if isinstance(given, tuple) else (given, None)
    device = known[name].device or device
    value = _value(name, value, known[name].shape, dtype, device)
    # The sum tells at a fraction of the cost; only where it overflows does every unit have to be looked at.
    finite = late or math.isfinite(value.sum().item()) or bool(torch.isfinite(value).all())
    if mask is None:
        if not finite:
            raise _unfinite(name, masked=False)
        return Clamp(value.detach())
    shape = known[name].shape
    if not isinstance(mask, Tensor):
        raise ClampError(f"clamp {name!r}: a mask of type {type(mask).__name__} given, expected a boolean tensor")
    if mask.dtype != torch.bool or tuple(mask.shape) not in (shape, tuple(value.shape)):
        raise ClampError(
            f"clamp {name!r}: mask of {mask.dtype} and shape {tuple(mask.shape)} given, expected torch.bool of shape "
            f"{shape} or {tuple(value.shape)}; True marks the units that are given"
        )
    mask = mask.to(device)
    if late:  # the same without asking whether it has to be done
        value = torch.where(mask | torch.isfinite(value).all(), value, 0)
    elif not finite:
        value = torch.where(mask, value, 0)
        if not bool(torch.isfinite(value).all()):
            raise _unfinite(name, masked=True)
    return Clamp(value.detach(), mask)


def _value(
    name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, kind: str = "clamp"
) -> Tensor:
    expected = f"(batch, {', '.join(map(str, shape))})"
    if not isinstance(value, Tensor):
        raise ClampError(f"{kind} {name!r}: {type(value).__name__} given, expected a tensor {expected}")
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        raise ClampError(
            f"{kind} {name!r}: a tensor of layout {value.layout} given, expected a dense one; use to_dense()"
        )
    if value.dim() == 0 or tuple(value.shape[1:]) != shape or len(value) == 0:
        classes = value.dim() == len(shape) == 1 and not value.is_floating_point() and dtype.is_floating_point
        one_hot = "class numbers have to be made one-hot (torch.nn.functional.one_hot)"
        axis = axis_to_mend(value.shape[1:], shape, "the tensor") if value.dim() else None
        mend = axis or (one_hot if classes else "the batch is the first axis")
        raise ClampError(
            f"{kind} {name!r}: shape {tuple(value.shape)} given, expected {expected} with at least one sample; {mend}"
        )
    if value.dtype != dtype:
        why = "as the network" if dtype.is_floating_point else "or torch.int32, since the node's edges read integers"
        raise ClampError(f"{kind} {name!r}: dtype {value.dtype} given, expected {dtype} {why}; convert it")
    if value.device != device:
        raise ClampError(f"{kind} {name!r}: on device {value.device}, expected {device}, where the node lies; move one")
    return value.clone() if value.is_inference() else value


def read_record(network: Network, record: Recorded) -> tuple[bool, tuple[Probe, ...]]:
    """Whether energies are recorded, and the probes, of what a user gave.

    Raises:
        SettingError: it is neither, names a node that is not there, or names one twice.
    """
    if isinstance(record, bool):
        return record, ()
    single = isinstance(record, str | Node | Probe) or not isinstance(record, Iterable)
    items: Iterable[object] = [record] if single else record  # type: ignore[assignment]
    energies, probes = False, list[Probe]()
    for item in items:
        if item is True:
            energies = True
        elif isinstance(item, str | Node | Probe):
            probes.append((item if isinstance(item, Probe) else Probe(item)).on(network))
        else:
            raise SettingError(
                f"record: {record!r} given, expected True (energies of all nodes), nodes, their names or probes, such "
                "as ['features'], or a list of these"
            )
    names = [probe.node for probe in probes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingError(f"record: node {twice!r} given twice; give one probe with all its parts and units")
    return energies, tuple(probes)
