"""Things as Python expressions that build them again: modules, settings, tensors, and a user's own classes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import pcsim
from pcsim.arguments import constructor_arguments, function_name
from pcsim.random_state import random_state_kept

LONGEST_TENSOR = 64
"""Tensors with more numbers are written as what they were drawn from, or by their shape alone."""


class Unwritten(Exception):  # noqa: N818
    """There is no code for a thing; caught within this file."""


class Writer:
    """Writes expressions, and keeps what they need to be imported.

    Attributes:
        imports: lines of code that must come before.
        notes: comments on what could not be written.
        known: what the imported names stand for.
    """

    def __init__(self) -> None:
        self.imports: dict[str, None] = {}
        self.notes: dict[str, None] = {}
        self.known: dict[str, object] = {}

    def thing(self, value: object) -> str:
        """An expression for a module, an energy, a schedule, a relaxation, a rule or an engine.

        Sources in turn: the constructor's arguments where attributes of the same names hold them, and the repr. Each is
        built on trial, and where that gives something else, the expression names the type with ``...`` for its
        arguments, and a note says so.
        """
        kind = type(value)
        before = dict(self.imports), dict(self.notes)
        for written in self._attempts(value):
            if self._builds(written, value):
                return written
            self.imports, self.notes = dict(before[0]), dict(before[1])
        name = self._named(kind)
        self.notes[
            f"# {name}(...) stands for arguments that are not known: let its attributes have the names of its "
            "arguments, or let its repr be code"
        ] = None
        return f"{name}(...)"

    def tensor(self, tensor: Tensor) -> str:
        """An expression for a tensor, number by number where it is small."""
        if tensor.numel() <= LONGEST_TENSOR:
            return f"tensor({tensor.tolist()!r}, dtype={tensor.dtype})"
        if tensor.is_floating_point() and torch.equal(tensor, drawn(tuple(tensor.shape), tensor.dtype)):
            seed = "torch.Generator().manual_seed(0)"
            return f"torch.randn({tuple(tensor.shape)}, generator={seed}, dtype={tensor.dtype})"
        self.notes[f"# tensors of more than {LONGEST_TENSOR} numbers are written as zeros"] = None
        return f"torch.zeros({tuple(tensor.shape)}, dtype={tensor.dtype})"

    def name(self, known: Any) -> str:
        """The name of a class or function, imported.

        Raises:
            Unwritten: it was defined within a function or in a script, so that it cannot be imported.
        """
        path, module = str(getattr(known, "__qualname__", "<no name>")), str(getattr(known, "__module__", None))
        root = path.split(".")[0]
        if "<" in path or module == "__main__" or not hasattr(sys.modules.get(module), root):
            raise Unwritten(path)
        self.imports[f"from {module} import {root}"] = None
        self.known[root] = getattr(sys.modules[module], root)
        return path

    def _builds(self, written: str, value: object) -> bool:
        """Whether an expression builds the like of a value: of its type, and with tensors of the same shapes."""
        names = {"nn": nn, "torch": torch, "tensor": torch.tensor, "pcsim": pcsim, "functools": functools} | self.known
        plain = isinstance(value, nn.Module) and all(_home(type(part)) == "nn" for part in value.modules())
        try:
            # Of torch's own modules the shapes will do, without memory for their values.
            with random_state_kept(), torch.device("meta") if plain else contextlib.nullcontext():
                built = eval(written, names)
        except Exception:  # whatever a user's constructor makes of it, this is not the way to build it
            return False
        if type(built) is not type(value):
            return False
        if isinstance(value, nn.Module) and (not isinstance(built, nn.Module) or _shapes(built) != _shapes(value)):
            return False
        return type(value).__repr__ is object.__repr__ or repr(built) == repr(value)

    def _named(self, kind: type) -> str:
        home = _home(kind)
        if home is not None:
            return f"{home}.{kind.__name__}"
        try:
            return self.name(kind)
        except Unwritten:
            self.notes[f"# {kind.__name__}: put its definition here, {kind.__qualname__} of {kind.__module__}"] = None
            self.known[kind.__name__] = kind
            return kind.__name__

    def _attempts(self, value: object) -> Iterator[str]:
        kind = type(value)
        if isinstance(value, nn.Sequential) and kind is nn.Sequential:
            yield f"nn.Sequential({', '.join(self.thing(child) for child in value)})"
            return
        if isinstance(value, functools.partial):
            self.imports["import functools"] = None
            given = [self.value(value.func), *map(self.value, value.args)]
            given += [f"{name}={self.value(own)}" for name, own in value.keywords.items()]
            yield f"functools.partial({', '.join(given)})"
            return
        with contextlib.suppress(Unwritten, LookupError, ValueError, TypeError):
            placed, named = constructor_arguments(value)
            given = [*map(self.value, placed), *(f"{name}={self.value(own)}" for name, own in named.items())]
            yield f"{self._named(kind)}({', '.join(given)})"
        written = " ".join(repr(value).split())
        if written.startswith(f"{kind.__name__}("):
            yield self._named(kind) + written[len(kind.__name__) :]

    def value(self, value: object) -> str:
        """An expression for a number, a text, a tensor, a container, a class, a function or a :meth:`thing`.

        Raises:
            Unwritten: a function that cannot be imported.
        """
        if value is None or isinstance(value, bool | int | str | torch.dtype):
            return repr(value)
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f"float({str(value)!r})"
        if isinstance(value, Tensor):
            return f"nn.Parameter({self.tensor(value)})" if isinstance(value, nn.Parameter) else self.tensor(value)
        if isinstance(value, list):
            return f"[{', '.join(map(self.value, value))}]"
        if isinstance(value, tuple):
            return f"({', '.join(map(self.value, value))}{',' if len(value) == 1 else ''})"
        if isinstance(value, Mapping):
            return f"{{{', '.join(f'{self.value(key)}: {self.value(item)}' for key, item in value.items())}}}"
        if isinstance(value, type):
            home = _home(value)
            return self.name(value) if home is None else f"{home}.{value.__name__}"
        if inspect.isroutine(value):
            return function_name(value) or self.name(value)
        return self.thing(value)


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers that a :class:`Writer` knows again, of the given shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _home(kind: type) -> str | None:
    """How code says where a type of torch's modules or of pcsim is; None for all others."""
    homes = {"nn": nn, "pcsim": pcsim}
    return next((name for name, home in homes.items() if getattr(home, kind.__name__, None) is kind), None)


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)]
