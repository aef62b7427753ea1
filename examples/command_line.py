"""Readers of the command line that the examples share: what does not fit is refused before any work."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pcsim


def number(kind: type[int] | type[float], least: float, most: float = math.inf, *, but: float | None = None) -> Any:
    """A number from ``least`` to ``most``, finite, other than ``but``, as argparse reads it."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(least - 1)
        if not least <= value <= most or math.isinf(value) or value == but:
            upper = "" if math.isinf(most) else f" to {most:g}"
            other = "" if but is None else f" other than {but:g}"
            raise argparse.ArgumentTypeError(
                f"{text} given, expected a {'whole ' * (kind is int)}number from {least:g}{upper}{other}"
            )
        return value

    return read


def add_seeds(parser: argparse.ArgumentParser, default: Sequence[int], most: float = math.inf) -> None:
    """``--seeds 0 1 2``: the seeds themselves, one run of everything for each."""
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=number(int, 0, most),
        default=list(default),
        metavar="SEED",
        help=f"one run of each; {' '.join(map(str, default))} by default",
    )


def device(text: str) -> str:
    """A device that tensors can be made on."""
    try:
        torch.empty(1, device=text).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used here ({str(error).splitlines()[0]})") from error
    return text


def file(text: str) -> Path:
    """A file that can be written."""
    path = Path(text)
    if path.is_dir() or not os.access(next(up for up in path.absolute().parents if up.exists()), os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} given, expected a file in a folder that can be written")
    return path


@contextmanager
def told_in_a_line(script: str) -> Iterator[None]:
    """An error of pcsim's ends the script with its message, without a traceback; several processes tell it once."""
    try:
        yield
    except pcsim.PCError as error:
        elsewhere = isinstance(error.__cause__, pcsim.errors.ProcessError)
        raise SystemExit(1 if elsewhere else f"{script}: {error}") from error


@contextmanager
def processes() -> Iterator[bool]:
    """With those that torchrun has started, if it has; whether this is the one that prints and writes."""
    if not dist.is_torchelastic_launched():
        yield True
        return
    dist.init_process_group()  # gloo for tensors on a CPU, nccl for those on a GPU
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def of_the_first(own: Any) -> Any:
    """What the first process has, in all of them."""
    said = [own]
    if dist.is_initialized():
        dist.broadcast_object_list(said)
    return said[0]


def own_device(device: str) -> str:
    """The GPU of this process, where torchrun has started one for each."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and dist.is_torchelastic_launched() else device
