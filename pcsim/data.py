"""Small image sets for examples and benchmarks, read strictly: a damaged file is an error, never a guess."""

from __future__ import annotations

import codecs
import hashlib
import http.client
import io
import math
import os
import pickle
import struct
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

from pcsim.errors import DataError

#: Per-channel mean and standard deviation of the training images scaled to [0, 1], for :func:`normalise`.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)

_MNIST_ADDRESS = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_MD5 = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
_CIFAR_ADDRESS = "https://www.cs.toronto.edu/~kriz/"
_CIFAR_ARCHIVES = {
    "cifar-10-batches-py": ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar-100-python": ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
}
_CROP_PADDING = 4


@attrs.frozen(eq=False)
class ImageData:
    r"""Images with their class labels.

    ``images`` is float32 of shape (N, \\*shape), ``labels`` int64 of shape (N,) with values in
    [0, ``classes``). Anything else raises :class:`~pcsim.errors.DataError`.
    """

    images: Tensor
    labels: Tensor
    classes: int

    def __attrs_post_init__(self) -> None:
        """Refuse what the methods could not serve, here rather than in the middle of training."""
        if self.images.dtype != torch.float32 or self.images.ndim < 2:
            raise DataError(
                f"images are {self.images.dtype} of shape {tuple(self.images.shape)}, expected torch.float32 "
                "of shape (N, *shape): convert with .float() and put the batch axis first"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels are {self.labels.dtype} of shape {tuple(self.labels.shape)}, expected torch.int64 "
                f"of shape ({len(self.images)},): give one class number for each image"
            )
        if self.labels.numel() and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.classes:
            raise DataError(
                f"labels run from {int(self.labels.min())} to {int(self.labels.max())}, expected 0 to "
                f"{self.classes - 1}: number the classes from 0, or raise classes={self.classes}"
            )

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.images)

    def one_hot(self) -> Tensor:
        """Return the labels as float32 of shape (N, classes): 1 at the label, 0 elsewhere."""
        return functional.one_hot(self.labels, self.classes).to(torch.float32)

    def dataset(self) -> TensorDataset:
        r"""Return pairs of image (\\*shape) and one-hot target (classes,), for a ``DataLoader``."""
        return TensorDataset(self.images, self.one_hot())

    def split(self, first: int, *, seed: int = 0) -> tuple[ImageData, ImageData]:
        """Return ``first`` samples drawn at random without replacement, and the rest.

        The same ``seed`` gives the same split. Raises DataError unless 0 <= ``first`` <= N.
        """
        self._check_count(first)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        order = order.to(self.images.device)
        return self._at(order[:first]), self._at(order[first:])

    def take(self, count: int) -> ImageData:
        """Return the first ``count`` samples, in order. Raises DataError unless 0 <= ``count`` <= N."""
        self._check_count(count)
        return attrs.evolve(self, images=self.images[:count], labels=self.labels[:count])

    def flatten(self) -> ImageData:
        """Return the same samples with images of shape (N, features)."""
        return attrs.evolve(self, images=self.images.flatten(1))

    def _at(self, index: Tensor) -> ImageData:
        return attrs.evolve(self, images=self.images[index], labels=self.labels[index.to(self.labels.device)])

    def _check_count(self, count: int) -> None:
        if not 0 <= count <= len(self):
            raise DataError(f"{count} samples asked for, expected 0 to {len(self)}: the set has no more")


def digits(*, seed: int = 0, test_size: int = 360) -> tuple[ImageData, ImageData]:
    """Return (train, test) of the 1797 8x8 digits that come with scikit-learn, shuffled by ``seed``.

    Images are (N, 64) in [0, 1]; 10 classes. Raises DataError if scikit-learn is missing or if
    ``test_size`` is not in [0, 1797]. Source: Alpaydin and Kaynak 1998, UCI, as in scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits() needs scikit-learn: pip install 'pcsim[examples]'") from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).to(torch.float32) / 16
    whole = ImageData(images, torch.from_numpy(labels).to(torch.int64), classes=10)
    test, train = whole.split(test_size, seed=seed)
    return train, test


def mnist(root: str | os.PathLike[str], *, download: bool = False) -> tuple[ImageData, ImageData]:
    """Return (train, test) of MNIST from idx files, plain or ``.gz``.

    They are looked for in ``root/MNIST/raw``, ``root/raw`` and ``root``; with ``download`` the missing
    ones are fetched into ``root/MNIST/raw``. Images are (N, 1, 28, 28) in [0, 1]; 10 classes.
    Raises DataError for missing, damaged or truncated files. Source: LeCun, Cortes and Burges.
    """
    base = Path(root).expanduser()
    folders = (base / "MNIST" / "raw", base / "raw", base)
    found: dict[str, Path] = {}
    for name, md5 in _MNIST_MD5.items():
        candidates = [folder / (name + ending) for folder in folders for ending in ("", ".gz")]
        file = next((file for file in candidates if file.is_file()), None)
        if file is None and download:
            file = folders[0] / f"{name}.gz"
            _fetch(f"{_MNIST_ADDRESS}{name}.gz", md5, file)
        if file is not None:
            found[name] = file
    missing = [name for name in _MNIST_MD5 if name not in found]
    if missing:
        raise DataError(
            f"MNIST: {', '.join(missing)} (plain or .gz) not found in {', '.join(map(str, folders))}; "
            f"expected all of {', '.join(_MNIST_MD5)}: put them there or pass download=True"
        )
    train, test = (
        _mnist_part(found[f"{part}-images-idx3-ubyte"], found[f"{part}-labels-idx1-ubyte"])
        for part in ("train", "t10k")
    )
    return train, test


def cifar10(root: str | os.PathLike[str], *, download: bool = False) -> tuple[ImageData, ImageData]:
    """Return (train, test) of CIFAR-10 from the python batches in ``root/cifar-10-batches-py``.

    Images are (N, 3, 32, 32), RGB in [0, 1], not normalised; 10 classes. ``download`` fetches missing
    files. Raises DataError for missing, damaged or unsafe files. Source: Krizhevsky 2009.
    """
    folder = Path(root).expanduser() / "cifar-10-batches-py"
    train, test = [f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]
    _complete(folder, train + test, download)
    return _cifar(folder, train, b"labels", 10), _cifar(folder, test, b"labels", 10)


def cifar100(root: str | os.PathLike[str], *, download: bool = False) -> tuple[ImageData, ImageData]:
    """Return (train, test) of CIFAR-100 with fine labels, from ``root/cifar-100-python``.

    Images are (N, 3, 32, 32), RGB in [0, 1], not normalised; 100 classes. ``download`` fetches missing
    files. Raises DataError for missing, damaged or unsafe files. Source: Krizhevsky 2009.
    """
    folder = Path(root).expanduser() / "cifar-100-python"
    _complete(folder, ["train", "test"], download)
    return _cifar(folder, ["train"], b"fine_labels", 100), _cifar(folder, ["test"], b"fine_labels", 100)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images - mean) / std per channel, for images (N, channels, height, width).

    Raises DataError unless there is one mean and one positive standard deviation for each channel.
    """
    fits = images.ndim == 4 and len(mean) == len(std) == images.shape[1] and all(value > 0 for value in std)
    if not (fits and images.is_floating_point()):
        raise DataError(
            f"{images.dtype} images of shape {tuple(images.shape)}, mean {tuple(mean)}, std {tuple(std)}: "
            "expected floats (N, channels, height, width), one mean and one positive std for each channel"
        )
    return (images - images.new_tensor(mean).view(-1, 1, 1)) / images.new_tensor(std).view(-1, 1, 1)


def standardise(train: ImageData, *others: ImageData) -> tuple[ImageData, ...]:
    """Return all sets scaled by one mean and one standard deviation: those of all numbers of the first.

    Raises DataError unless the numbers of the first differ, and are finite.
    """
    mean, deviation = train.images.mean(), train.images.std()
    if not 0 < float(deviation) < math.inf:
        raise DataError(
            f"standardise: {len(train)} images of mean {float(mean):g} and standard deviation {float(deviation):g}, "
            "expected a finite deviation above zero: give the training set first, with images that differ"
        )
    return tuple(attrs.evolve(part, images=(part.images - mean) / deviation) for part in (train, *others))


def augment(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Return each image flipped left to right with probability 1/2 and cropped at random.

    The crop has the original size and is taken after zero padding of 4 on each side, so normalise
    first if the padding is to be the mean colour. Images and result are (N, channels, height, width).
    Raises DataError for any other number of axes.
    """
    if images.ndim != 4:
        raise DataError(
            f"images of shape {tuple(images.shape)}, expected (N, channels, height, width): augment before "
            "flattening, and add a batch axis to a single image"
        )
    count, channels, height, width = images.shape
    drawn, device = generator.device, images.device
    offsets = torch.randint(2 * _CROP_PADDING + 1, (2, count, 1), generator=generator, device=drawn)
    flipped = torch.rand((count, 1), generator=generator, device=drawn).to(device) < 0.5
    top, left = offsets.to(device)
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = left + torch.where(flipped, columns.flip(0), columns)
    padded = functional.pad(images, [_CROP_PADDING] * 4)
    return padded[
        torch.arange(count, device=device).view(-1, 1, 1, 1),
        torch.arange(channels, device=device).view(1, -1, 1, 1),
        rows.view(count, 1, height, 1),
        columns.view(count, 1, 1, width),
    ]


def _mnist_part(image_file: Path, label_file: Path) -> ImageData:
    images, labels = _read_idx(image_file, (28, 28)), _read_idx(label_file, ())
    if len(images) != len(labels) or int(labels.max()) > 9:
        found = f"{len(labels)} labels up to {int(labels.max())} found"
        raise _damaged(label_file, f"{found}, expected {len(images)} as in {image_file.name}, up to 9")
    return ImageData(images.unsqueeze(1).to(torch.float32).div_(255), labels.to(torch.int64), classes=10)


def _read_idx(file: Path, item: tuple[int, ...]) -> Tensor:
    """Return the uint8 array (N, *item) of an idx file, whose every byte must be accounted for."""
    content, note = file.read_bytes(), ""
    if file.suffix == ".gz":
        # Unlike the gzip module, this hands over what a cut-off file still holds, so its size can be told.
        stream = zlib.decompressobj(wbits=31)
        try:
            content = stream.decompress(content)
        except zlib.error as error:
            raise _damaged(file, f"cannot be decompressed ({error})") from error
        note = "" if stream.eof else ", and the compressed stream is cut off"
    axes = 1 + len(item)
    magic, header = bytes((0, 0, 8, axes)), 4 + 4 * axes
    if len(content) < header:
        raise _damaged(file, f"{len(content)} bytes found, expected a header of {header}{note}")
    if content[:4] != magic:
        raise _damaged(file, f"starts with {content[:4].hex()}, expected {magic.hex()} (uint8, {axes} axes)")
    shape = struct.unpack(f">{axes}I", content[4:header])
    if shape[0] == 0 or shape[1:] != item:
        raise _damaged(file, f"shape {shape} found, expected {('N > 0', *item)}")
    expected = header + math.prod(shape)
    if len(content) != expected or note:
        raise _damaged(file, f"{len(content)} bytes found, expected {expected} for shape {shape}{note}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)


def _damaged(file: Path, finding: str) -> DataError:
    return DataError(f"{file} is damaged: {finding}; remove it and fetch or unpack it again")


def _cifar(folder: Path, names: list[str], label_key: bytes, classes: int) -> ImageData:
    pixels, labels = zip(*(_read_batch(folder / name, label_key, classes) for name in names), strict=True)
    images = torch.from_numpy(np.concatenate(pixels)).view(-1, 3, 32, 32).to(torch.float32).div_(255)
    return ImageData(images, torch.cat(labels), classes)


class _PickledType:
    """Stands in for ``numpy.dtype`` while a batch is read; its state (byte order) is moot for one byte."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


class _PickledArray:
    """Stands in for ``numpy.ndarray``, so that a hostile file never sets the state of a real array."""

    def __init__(self, *_: object) -> None:
        self.values: np.typing.NDArray[np.uint8] = np.empty((0, 0), np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _PickledType, bool, bytes]) -> None:
        _, shape, kind, column_major, content = state
        if kind.name not in ("u1", "uint8"):
            raise ValueError(f"array of type {kind.name}, expected uint8")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if column_major else "C")


_ALLOWED_GLOBALS = {
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledType,
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("_codecs", "encode"): codecs.encode,
}


class _BatchUnpickler(pickle.Unpickler):
    """Reads plain containers and uint8 arrays. A pickle runs what it names, so it may name little."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for the forbidden global {module}.{name}")
        return _ALLOWED_GLOBALS[module, name]


def _read_batch(file: Path, label_key: bytes, classes: int) -> tuple[NDArray[np.uint8], Tensor]:
    content = file.read_bytes()
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
        data, labels = batch[b"data"], batch[label_key]
    except Exception as error:  # a damaged pickle may raise nearly anything, says the standard library
        raise _damaged(file, f"{len(content)} bytes that are no batch ({error!r})") from error
    pixels = data.values if isinstance(data, _PickledArray) else np.empty((0, 0), np.uint8)
    if pixels.ndim != 2 or pixels.shape[1] != 3072 or not len(pixels):
        raise _damaged(file, f"b'data' of shape {pixels.shape} found, expected uint8 (N > 0, 3072)")
    known = isinstance(labels, list) and all(type(label) is int and 0 <= label < classes for label in labels)
    if not known or len(labels) != len(pixels):
        raise _damaged(file, f"{label_key!r} is no list of {len(pixels)} integers from 0 to {classes - 1}")
    return pixels, torch.tensor(labels)


def _fetch(url: str, md5: str, file: Path) -> None:
    """Put the content of ``url`` at ``file``, whole and with the right hash, or raise and leave nothing."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".download-") as scratch:
            partial = Path(scratch) / file.name
            digest = hashlib.md5(usedforsecurity=False)
            with urllib.request.urlopen(url, timeout=60) as source, partial.open("wb") as target:
                while block := source.read(1 << 20):
                    digest.update(block)
                    target.write(block)
            if digest.hexdigest() != md5:
                raise DataError(
                    f"{url}: MD5 {digest.hexdigest()} of {partial.stat().st_size} bytes, expected {md5}: "
                    "cut off or changed on the way; try again, or unpack a copy of your own there"
                )
            os.replace(partial, file)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{url}: download into {file.parent} failed ({error}): check the network and the "
            "folder, or unpack a copy of your own there"
        ) from error


def _complete(folder: Path, names: list[str], download: bool) -> None:
    """Put what ``folder`` lacks of ``names`` there, all of it or nothing, or raise."""
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return
    archive, md5 = _CIFAR_ARCHIVES[folder.name]
    if not download:
        raise DataError(
            f"{folder}: {', '.join(missing)} not found, expected {', '.join(names)}: unpack {archive} in "
            f"{folder.parent} or pass download=True"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as scratch:
        packed = Path(scratch) / archive
        _fetch(_CIFAR_ADDRESS + archive, md5, packed)
        with tarfile.open(packed) as members:
            for name in missing:
                # Copied out by name, never extracted to the path it claims: no member can land elsewhere.
                source = members.extractfile(f"{folder.name}/{name}")
                assert source is not None, "the hash vouches for what the archive holds"
                (Path(scratch) / name).write_bytes(source.read())
        for name in missing:
            os.replace(Path(scratch) / name, folder / name)
