"""Running a module once, without a trace: to learn its shapes, and what it does besides computing."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin

from pcsim.graph.statistics import frozen_statistics, normalises

OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
DRAWING = (
    _DropoutNd,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
"""Modules of torch.nn that draw random numbers, at some setting or other."""
OWN_MODULES = ("torch.nn.modules.", "pcsim.graph.combining", "pcsim.topologies.")
"""Where the modules of torch.nn and pcsim are defined."""
PROBE_BATCH = 2


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """As ``list(module.parameters())``, which walks even a module without children at ten times the cost."""
    if module._modules:
        return list(module.parameters())
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def tensor_options(*modules: nn.Module, otherwise: Tensor | None = None) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the first floating parameter or buffer, else of ``otherwise``, else the default ones."""
    for module in modules:
        for tensor in chain(module.parameters(), module.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype, tensor.device
    if otherwise is not None:
        return otherwise.dtype, otherwise.device
    return torch.get_default_dtype(), torch.get_default_device()


def integers_taken(module: nn.Module) -> int | None:
    """How many integers, from 0 on, a module tells apart: its ``num_embeddings``, as of ``nn.Embedding``, or that of
    the first module of a Sequential. None of a module that takes numbers.
    """
    if isinstance(module, nn.Sequential) and len(module):
        return integers_taken(module[0])
    # Asking a module for what it lacks takes ten times as long.
    there = "num_embeddings" in vars(module) or hasattr(type(module), "num_embeddings")
    count = getattr(module, "num_embeddings", None) if there else None
    return count if isinstance(count, int) else None


def zeros_for(module: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Two samples of zeros that a module takes, (2, *shape): numbers of this dtype, or integers."""
    whole = integers_taken(module) is not None
    return torch.zeros(PROBE_BATCH, *shape, dtype=torch.long if whole else dtype, device=device)


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put a module into training or evaluation mode, and what it holds, and back.

    Modules change their mode by their own ``train``, which may do more than set it, and only those that have to.
    """
    before = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in before:
            if part.training != training:
                part.train(training)
        yield
    finally:
        for part, mode in before:
            if part.training != mode:
                part.train(mode)


def probe(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """A module's output, its buffers, tensors in its attributes and the random state left as they were."""
    with _random_state_kept(inputs), torch.no_grad():
        if plain(module):
            return on_copies(module, inputs)
        with _attributes_kept(module):
            return on_copies(module, inputs)


def on_copies(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """A module's output, evaluated on copies of its buffers, so that these stay as they are."""
    copies = {name: buffer.clone() for name, buffer in module.named_buffers()}
    output: Tensor = functional_call(module, copies, tuple(inputs)) if copies else module(*inputs)
    return output


def start_lazily(module: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Let lazy modules take their shapes from inputs, and their weights from the random state, as at a first batch."""
    if any(isinstance(part, LazyModuleMixin) and part.has_uninitialized_params() for part in module.modules()):
        with in_mode(module, training=False), torch.no_grad():
            module(*inputs)


def plain(module: nn.Module) -> bool:
    """Whether a module is made of torch.nn's and pcsim's alone, so that it is known what it does besides computing."""
    return all(
        type(part).__module__.startswith(OWN_MODULES)
        and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
        and "forward" not in vars(part)
        for part in module.modules()
    )


def may_draw(module: nn.Module) -> bool:
    """Whether a module may draw random numbers, at its present settings or others: a user's own always may."""
    return not plain(module) or any(isinstance(part, DRAWING) for part in module.modules())


def what_stays(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[bool, str]:
    """What evaluating a module leaves in it, found by evaluating it twice on the same inputs, in both modes.

    Returns:
        Whether its buffers move, those of torch's normalisation left out; and the name of an attribute that is no
        buffer, in which a state is kept, or nothing.
    """
    if plain(module):
        return False, ""
    moves, attribute = False, ""
    for training in (True, False):
        for given in (inputs, [torch.ones_like(tensor) for tensor in inputs]):
            with in_mode(module, training), _random_state_kept(inputs), _attributes_kept(module):
                try:
                    own_moves, own_attribute = _evaluated_twice(module, given)
                except Exception:  # what cannot run in a mode, or on such values, is not meant to
                    continue
                moves, attribute = moves or own_moves, attribute or own_attribute
    return moves, attribute


def _evaluated_twice(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[bool, str]:
    norms = [part for part in module.modules() if normalises(part)]
    with torch.no_grad(), frozen_statistics(norms):
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        copies = {name: buffer.clone() for name, buffer in before.items()}
        seen = []
        for _ in range(2):
            functional_call(module, copies, tuple(inputs))
            seen.append({place: tensor.clone() for place, tensor in _tensor_attributes(module).items()})
        moves = any(not _same(copies[name], before[name]) for name in before)
        changed = (name for name, tensor in seen[1].items() if name in seen[0] and not _same(seen[0][name], tensor))
        return moves, next(changed, "")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _tensor_attributes(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that modules hold in plain attributes, neither parameter nor buffer, by name."""
    return {
        f"{path}.{name}".lstrip(".") + place: tensor
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if name not in OWN
        for place, tensor in _tensors_in(value)
    }


def _tensors_in(value: object) -> list[tuple[str, Tensor]]:
    """A tensor, or those of a tuple, list or dictionary, each with its place in it."""
    if isinstance(value, Tensor):
        return [("", value)]
    if isinstance(value, tuple | list):
        value = dict(enumerate(value))
    held = value.items() if isinstance(value, dict) else ()
    return [(f"[{place!r}]", each) for place, each in held if isinstance(each, Tensor)]


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put back what modules note of their inputs in plain attributes."""
    noted = [(part, {name: _copied(value) for name, value in _plain(part).items()}) for part in module.modules()]
    try:
        yield
    finally:
        for part, before in noted:
            for name in [name for name, value in _plain(part).items() if name not in before and _tensors_in(value)]:
                delattr(part, name)
            vars(part).update(before)


def _plain(part: nn.Module) -> dict[str, object]:
    """Attributes of a module that may hold tensors and are not PyTorch's own."""
    held = (Tensor, tuple, list, dict, type(None))
    return {name: value for name, value in vars(part).items() if name not in OWN and isinstance(value, held)}


def _copied(value: object) -> object:
    return copy.copy(value) if isinstance(value, list | dict) else value


def leaf(tensor: Tensor) -> Tensor:
    """The tensor itself, from now on one that gradients are asked for, unless it holds integers."""
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def checkpoints_reentrantly(module: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether a module uses reentrant checkpointing, through which no gradient can be asked for."""
    if plain(module):
        return False
    with _random_state_kept(inputs), torch.enable_grad(), _attributes_kept(module):
        try:
            output = on_copies(module, [leaf(tensor.clone()) for tensor in inputs])
        except Exception:  # probing without gradients has said what is wrong
            return False
    pending, seen = [getattr(output, "grad_fn", None)], set()
    while pending:
        function = pending.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if function.name().startswith("CheckpointFunction"):
            return True
        pending += [before for before, _ in function.next_functions]
    return False


@contextmanager
def _random_state_kept(inputs: Sequence[Tensor]) -> Iterator[None]:
    device = inputs[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def held_draw(seed: int, owner: str, device: torch.device) -> Iterator[None]:
    """Make every random draw inside start from ``seed``, otherwise for each owner; leave the random state as it was."""
    own = seed ^ zlib.crc32(owner.encode())
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(own)
        if device.type == "cuda":
            torch.cuda.manual_seed(own)
        yield
