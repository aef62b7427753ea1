"""What ``benchmarks/device.sh`` does, part by part; each runs in a process of its own that alone uses the device."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

import pcsim
from benchmarks.command import TOO_LARGE, timed_rows
from benchmarks.contender import BACKPROP_LOOP, BATCHED, COMPILED
from benchmarks.epoch import IMAGES, TEST_IMAGES, train_an_epoch
from benchmarks.rows import Row, check_agreement
from benchmarks.variants import BACKPROP
from benchmarks.workloads import FULL_WIDTH, WORKLOADS, Topology, workloads

Part = Callable[[argparse.Namespace, float], Iterator[list[Row]]]
"""Measures within so many seconds, as options say; yields rows as soon as it has some."""
SMALL_IMAGES = 16


def versions(options: argparse.Namespace, seconds: float) -> Iterator[list[Row]]:
    """Print what is there, and refuse a device that is not."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if options.device.type not in ("cpu", found.type if found else ""):
        seen = "no device but a CPU" if found is None else f"{found.type} and a CPU"
        raise SystemExit(f"--device {options.device}: PyTorch {torch.__version__} sees {seen}")
    print(f"python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    print(f"pcsim {pcsim.__version__}")
    print(f"device {options.device}: {device_name(options.device)}, {options.threads} threads", flush=True)
    yield []


def device_name(device: torch.device) -> str:
    """What its maker calls it, where PyTorch tells."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type


def workload(name: str, options: argparse.Namespace, seconds: float) -> Iterator[list[Row]]:
    """Training steps of one workload, in turn; afterwards, since a compiler may take all the time, the compiled one.

    Small workloads compare numbers, so products are those of IEEE single precision; networks of full width are run as
    PyTorch is set when nobody sets it, with TF32 in convolutions.
    """
    torch.backends.cudnn.allow_tf32 = name in FULL_WIDTH
    [found] = workloads(options.quick, [name])
    start = time.monotonic()
    chosen = {**vars(options), "implementations": [each for each in options.implementations if each != COMPILED]}
    rows = timed_rows(found, argparse.Namespace(**chosen), seconds)
    yield rows
    chosen = {**vars(options), "implementations": [BACKPROP_LOOP, COMPILED], "variants": [BACKPROP.name]}
    if COMPILED not in TOO_LARGE.get(name, ((), options.implementations))[1]:
        return
    pair = timed_rows(found, argparse.Namespace(**chosen), seconds - (time.monotonic() - start))
    compiled = [row for row in pair if row.implementation == COMPILED]
    check_agreement([*rows, *compiled], BATCHED)
    yield compiled


def several(names: Sequence[str], options: argparse.Namespace, seconds: float) -> Iterator[list[Row]]:
    """Small workloads, one after the other in one process."""
    start = time.monotonic()
    for place, name in enumerate(names):
        left = seconds - (time.monotonic() - start)
        yield from workload(name, options, left / (len(names) - place))


def epoch(options: argparse.Namespace, seconds: float) -> Iterator[list[Row]]:
    """An epoch of VGG10, with and without rounded messages."""
    [topology] = workloads(options.quick, ["VGG10"])
    assert isinstance(topology, Topology)
    rounded = [] if options.device.type == "cpu" else [torch.bfloat16]
    if not rounded:
        print("messages in bfloat16: left out, since some CPUs abort on such products", file=sys.stderr)
    counts = (SMALL_IMAGES, SMALL_IMAGES) if options.quick else (IMAGES, TEST_IMAGES)
    yield train_an_epoch(topology, options.device, [None, *rounded], seconds, *counts)


PARTS: dict[str, Part] = {
    "versions": versions,
    **{name: partial(workload, name) for name in (*WORKLOADS, *FULL_WIDTH)},
    "W6 to W8": partial(several, ["W6", "W7", "W8"]),
    "epoch": epoch,
}
