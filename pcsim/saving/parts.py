"""What belongs to a module that is kept: the modules inside it, and their parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


def own_parts(module: nn.Module, given: Mapping[int, nn.Module]) -> dict[str, nn.Module]:
    """A module and what is inside it, by name, but for the modules that were given to it."""
    return {name: part for name, part in module.named_modules() if id(part) not in given}


def held_tensors(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Parameters and buffers: the name in all, the part that holds it, the name there, and the tensor."""
    for name, part in parts.items():
        for own, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield f"{name}.{own}" if name else own, part, own, tensor
