"""Image sets: what they hold, what they refuse, and that nothing in a file is run or half fetched."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pcsim import data
from pcsim.data import ImageData
from pcsim.errors import DataError


def idx(values: np.ndarray) -> bytes:
    """Return the idx file of a uint8 array."""
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def mnist_files(train: int = 5, test: int = 3) -> dict[str, bytes]:
    """Return the four files of a tiny MNIST whose pixels and labels can be told from their place."""
    files = {}
    for part, count in (("train", train), ("t10k", test)):
        pixels = (np.arange(count * 784) % 256).astype(np.uint8).reshape(count, 28, 28)
        files[f"{part}-images-idx3-ubyte"] = idx(pixels)
        files[f"{part}-labels-idx1-ubyte"] = idx(np.arange(count, dtype=np.uint8))
    return files


def write_mnist(folder: Path, *, packed: bool = False) -> None:
    """Write the tiny MNIST into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in mnist_files().items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def cifar_batch(count: int, label_key: bytes = b"labels") -> bytes:
    """Return a batch as an old pickle: what the published files are, apart from their Python 2 strings."""
    pixels = (np.arange(count * 3072) % 251).astype(np.uint8).reshape(count, 3072)
    return pickle.dumps({b"data": pixels, label_key: list(range(count))}, protocol=2)


def cifar_files() -> dict[str, bytes]:
    """Return the six batches of a tiny CIFAR-10."""
    return {name: cifar_batch(2) for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]}


def write_cifar10(root: Path) -> Path:
    """Write the tiny CIFAR-10 and return its folder."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, content in cifar_files().items():
        (folder / name).write_bytes(content)
    return folder


def numbered(count: int = 10, classes: int = 10) -> ImageData:
    """Return images that each hold their own number, which is also their label."""
    return ImageData(torch.arange(count).float().view(count, 1, 1, 1), torch.arange(count), classes)


def test_image_data_methods() -> None:
    images = ImageData(torch.rand(4, 1, 2, 3), torch.tensor([2, 0, 1, 2]), classes=3)
    assert len(images) == 4
    assert images.one_hot().tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert images.one_hot().dtype == torch.float32
    flat = images.flatten()
    assert flat.images.shape == (4, 6)
    image, target = flat.dataset()[1]
    assert torch.equal(image, images.images[1].flatten())
    assert torch.equal(target, torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(images.take(2).labels, torch.tensor([2, 0]))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64), "float64"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), "batch axis"),
        (
            torch.zeros(2, 3),
            torch.zeros(3, dtype=torch.int64),
            r"\(3,\), expected torch.int64 of shape \(2,\)",
        ),
        (torch.zeros(2, 3), torch.zeros(2), "labels are torch.float32"),
        (torch.zeros(2, 3), torch.tensor([0, 4]), "from 0 to 4, expected 0 to 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "from -1 to 0"),
    ],
)
def test_image_data_refuses(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageData(images, labels, classes=4)


def test_split_is_a_random_partition() -> None:
    whole = numbered()
    first, rest = whole.split(7, seed=1)
    assert (len(first), len(rest)) == (7, 3)
    assert sorted([*first.labels.tolist(), *rest.labels.tolist()]) == list(range(10))
    assert torch.equal(first.images.flatten().long(), first.labels)
    assert torch.equal(first.labels, whole.split(7, seed=1)[0].labels)
    assert not torch.equal(first.labels, whole.split(7, seed=2)[0].labels)
    assert len(whole.split(10)[1]) == 0


@pytest.mark.parametrize("count", [-1, 11])
def test_more_samples_than_there_are(count: int) -> None:
    for ask in (numbered().take, numbered().split):
        with pytest.raises(DataError, match=f"{count} samples asked for, expected 0 to 10"):
            ask(count)


def test_digits() -> None:
    pytest.importorskip("sklearn")
    train, test = data.digits()
    assert (train.images.shape, test.images.shape) == ((1437, 64), (360, 64))
    assert (train.images.min(), train.images.max()) == (0, 1)
    assert train.labels.unique().tolist() == test.labels.unique().tolist() == list(range(10))
    assert torch.equal(train.images, data.digits()[0].images)
    assert not torch.equal(train.images, data.digits(seed=1)[0].images)
    with pytest.raises(DataError, match="1798 samples"):
        data.digits(test_size=1798)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pcsim\[examples\]"):
        data.digits()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["MNIST/raw", "raw", "."])
def test_mnist(tmp_path: Path, below: str, packed: bool) -> None:
    write_mnist(tmp_path / below, packed=packed)
    train, test = data.mnist(tmp_path)
    assert (train.images.shape, test.images.shape) == ((5, 1, 28, 28), (3, 1, 28, 28))
    assert train.labels.tolist() == [0, 1, 2, 3, 4]
    expected = torch.arange(5 * 784).remainder(256).float().view(5, 1, 28, 28) / 255
    assert torch.equal(train.images, expected)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (IMAGES, lambda content: content[:-1], "3935 bytes found, expected 3936"),
        (IMAGES, lambda content: content + b"\0", "3937 bytes found, expected 3936"),
        (IMAGES, lambda content: content[:7], "7 bytes found, expected a header of 16"),
        (IMAGES, lambda _: b"", "0 bytes found"),
        (IMAGES, lambda content: b"\0\0\x0d\x03" + content[4:], "starts with 00000d03, expected 00000803"),
        (IMAGES, lambda _: idx(np.zeros((5, 28, 27), np.uint8)), r"\(5, 28, 27\)"),
        (IMAGES, lambda _: idx(np.zeros((0, 28, 28), np.uint8)), "N > 0"),
        (LABELS, lambda _: idx(np.zeros(4, np.uint8)), "4 labels up to 0 found, expected 5"),
        (LABELS, lambda _: idx(np.full(5, 10, np.uint8)), "up to 10"),
        (LABELS, lambda _: idx(np.zeros((5, 1), np.uint8)), "expected 00000801"),
    ],
)
def test_mnist_damaged(tmp_path: Path, name: str, damage: Callable[[bytes], bytes], message: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / name).write_bytes(damage(mnist_files()[name]))
    with pytest.raises(DataError, match=f"{name} is damaged: .*{message}"):
        data.mnist(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "3936 bytes found, expected 3936 .* cut off"),
        (lambda content: content[: len(content) // 2], "found, expected 3936 .* cut off"),
        (lambda content: content[:-8] + b"\0" * 8, "cannot be decompressed"),
        (lambda _: mnist_files()[IMAGES], "cannot be decompressed"),
    ],
)
def test_mnist_damaged_gz(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    write_mnist(tmp_path, packed=True)
    file = tmp_path / f"{IMAGES}.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=f"{file.name} is damaged: .*{message}"):
        data.mnist(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / LABELS).unlink()
    with pytest.raises(DataError, match=f"MNIST: {LABELS} .*not found in .*raw.*download=True"):
        data.mnist(tmp_path)
    (write_cifar10(tmp_path) / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"data_batch_3 not found.*unpack cifar-10-python.tar.gz in .*download"):
        data.cifar10(tmp_path)
    with pytest.raises(DataError, match="cifar-100-python: train, test not found"):
        data.cifar100(tmp_path)


def test_cifar10(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    train, test = data.cifar10(str(tmp_path))
    assert (train.images.shape, test.images.shape) == ((10, 3, 32, 32), (2, 3, 32, 32))
    assert train.labels.tolist() == [0, 1] * 5
    expected = torch.arange(2 * 3072).remainder(251).float().view(2, 3, 32, 32) / 255
    assert torch.equal(test.images, expected)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize("column_major", [False, True])
def test_cifar100_fine_labels(tmp_path: Path, module: bytes, column_major: bool) -> None:
    pixels = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    batch = {b"data": np.asfortranarray(pixels) if column_major else pixels, b"coarse_labels": [1, 2]}
    content = pickle.dumps({**batch, b"fine_labels": [99, 7]}, protocol=2)
    content = content.replace(b"numpy._core.multiarray", module)
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        (tmp_path / "cifar-100-python" / name).write_bytes(content)
    train, _ = data.cifar100(tmp_path)
    assert (train.classes, train.labels.tolist()) == (100, [99, 7])
    assert torch.equal(train.images.flatten(1).mul(255).round().to(torch.uint8), torch.from_numpy(pixels))


def test_cifar_python2_pickle(tmp_path: Path) -> None:
    """The published batches were written by Python 2: every string is a byte string, arrays included."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T\x00\x0c\x00\x00" + b"\xff" * 3072 + b"tb"
    )
    folder = write_cifar10(tmp_path)
    (folder / "test_batch").write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x09eu.")
    _, test = data.cifar10(tmp_path)
    assert test.labels.tolist() == [9]
    assert test.images.min() == 1


class Payload:
    """Unpickles to a call of ``os.mkdir``."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_is_not_run(tmp_path: Path, protocol: int) -> None:
    folder, target = write_cifar10(tmp_path), tmp_path / "made"
    content = pickle.dumps({b"data": Payload(target), b"labels": [0]}, protocol=protocol)
    (folder / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=rf"data_batch_2 is damaged.*forbidden global {os.name}.mkdir"):
        data.cifar10(tmp_path)
    assert not target.exists()
    pickle.loads(content)
    assert target.exists(), "the payload itself must work, or the test shows nothing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cifar_batch(2)[:-50], "bytes that are no batch"),
        (b"", "0 bytes that are no batch"),
        (b"not a pickle", "no batch"),
        (pickle.dumps([1]), "no batch"),
        (pickle.dumps({b"labels": [0]}), "KeyError"),
        (cifar_batch(2, b"fine_labels"), "KeyError.*labels"),
        (pickle.dumps({b"data": {}, b"labels": []}), r"expected uint8 \(N > 0, 3072\)"),
        (pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [0]}, 2), "type f8, expected uint8"),
        (pickle.dumps({b"data": np.zeros((1, 9), np.uint8), b"labels": [0]}, 2), r"shape \(1, 9\)"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, 2), "list of 2"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, 2), "from 0 to 9"),
        (b"cnumpy\nndarray\n}(X\x06\x00\x00\x00valuesK\x01ub.", "TypeError"),
        # numpy itself would make objects out of these eight bytes, and crash or worse when one is used.
        (
            b"\x80\x02}(U\x04datacnumpy\nndarray\nK\x01\x85cnumpy\ndtype\nU\x01O\x85RU\x08AAAAAAAA\x87R"
            b"U\x06labels](K\x00eu.",
            r"shape \(0, 0\)",
        ),
    ],
)
def test_cifar_damaged(tmp_path: Path, content: bytes, message: str) -> None:
    (write_cifar10(tmp_path) / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=f"test_batch is damaged: .*{message}"):
        data.cifar10(tmp_path)


def serve_mnist(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the packed tiny MNIST in ``source`` stand for the published one."""
    write_mnist(source, packed=True)
    hashes = {name: hashlib.md5((source / f"{name}.gz").read_bytes()).hexdigest() for name in mnist_files()}
    monkeypatch.setattr(data, "_MNIST_ADDRESS", source.as_uri() + "/")
    monkeypatch.setattr(data, "_MNIST_MD5", hashes)


def test_mnist_download_fetches_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_mnist(tmp_path / "source", monkeypatch)
    root = tmp_path / "root"
    assert len(data.mnist(root, download=True)[0]) == 5
    raw = root / "MNIST" / "raw"
    assert sorted(os.listdir(raw)) == sorted(f"{name}.gz" for name in mnist_files())
    (raw / f"{LABELS}.gz").unlink()
    for name in mnist_files():
        if name != LABELS:
            (tmp_path / "source" / f"{name}.gz").unlink()
    assert len(data.mnist(root, download=True)[0]) == 5


def test_wrong_hash_leaves_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target" / "file"
    source.write_bytes(b"content")
    with pytest.raises(DataError, match=f"MD5 {hashlib.md5(b'content').hexdigest()} of 7 bytes, expected 00"):
        data._fetch(source.as_uri(), "00", target)
    assert list(target.parent.iterdir()) == []
    data._fetch(source.as_uri(), hashlib.md5(b"content").hexdigest(), target)
    assert target.read_bytes() == b"content"
    assert list(target.parent.iterdir()) == [target]


def test_download_that_fails(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: download into .* failed"):
        data._fetch((tmp_path / "absent").as_uri(), "00", tmp_path / "target" / "file")


def serve_cifar10(source: Path, monkeypatch: pytest.MonkeyPatch, md5: str | None = None) -> None:
    """Let an archive of the tiny CIFAR-10 stand for the published one."""
    folder = write_cifar10(source)
    archive = source / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as members:
        members.add(folder, folder.name)
        members.add(folder / "test_batch", "../escaped")
    known = {folder.name: (archive.name, md5 or hashlib.md5(archive.read_bytes()).hexdigest())}
    monkeypatch.setattr(data, "_CIFAR_ADDRESS", source.as_uri() + "/")
    monkeypatch.setattr(data, "_CIFAR_ARCHIVES", known)


def test_cifar10_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_cifar10(tmp_path / "source", monkeypatch)
    root = tmp_path / "root"
    assert len(data.cifar10(root, download=True)[0]) == 10
    folder = root / "cifar-10-batches-py"
    assert sorted(os.listdir(folder)) == sorted(cifar_files())
    assert sorted(os.listdir(tmp_path)) == ["root", "source"]
    (folder / "test_batch").unlink()
    kept = (folder / "data_batch_1").stat().st_mtime_ns
    assert len(data.cifar10(root, download=True)[1]) == 2
    assert (folder / "data_batch_1").stat().st_mtime_ns == kept


def test_cifar10_download_with_wrong_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_cifar10(tmp_path / "source", monkeypatch, md5="00")
    with pytest.raises(DataError, match="expected 00"):
        data.cifar10(tmp_path / "root", download=True)
    assert not [entry for entry in (tmp_path / "root").rglob("*") if entry.is_file()]


def test_normalise() -> None:
    images = torch.rand(5, 3, 4, 4)
    result = data.normalise(images, data.CIFAR10_MEAN, data.CIFAR10_STD)
    assert torch.allclose(result[:, 1], (images[:, 1] - 0.4822) / 0.1994)
    for wrong in (images[:, :2], images[0], images.to(torch.uint8)):
        with pytest.raises(DataError, match="one positive std for each channel"):
            data.normalise(wrong, data.CIFAR10_MEAN, data.CIFAR10_STD)
    with pytest.raises(DataError, match="one positive std"):
        data.normalise(images, data.CIFAR10_MEAN, (1.0, 0.0, 1.0))


def seeded(seed: int) -> torch.Generator:
    """Return a generator of its own."""
    return torch.Generator().manual_seed(seed)


def test_standardise_scales_all_sets_as_the_first() -> None:
    train, test = data.standardise(*(ImageData(torch.rand(n, 3, 2) * n, torch.zeros(n).long(), 1) for n in (50, 7)))
    assert train.images.mean().item() == pytest.approx(0, abs=1e-6)
    assert train.images.std().item() == pytest.approx(1)
    assert (train.images.shape, test.images.shape) == ((50, 3, 2), (7, 3, 2))
    whole = ImageData(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1]), 2)
    (first, other) = data.standardise(whole, ImageData(torch.tensor([[5.0]]), torch.tensor([1]), 2))
    torch.testing.assert_close(first.images, torch.tensor([[-1.0], [1.0]]) / 2**0.5)
    torch.testing.assert_close(other.images, torch.tensor([[3.0]]) / 2**0.5)
    torch.testing.assert_close(first.labels, whole.labels)


@pytest.mark.parametrize("images", [torch.ones(3, 2), torch.tensor([[1.0, torch.nan]])])
def test_standardise_refuses_what_has_no_spread(images: torch.Tensor) -> None:
    with pytest.raises(DataError, match="expected a finite deviation above zero"):
        data.standardise(ImageData(images, torch.zeros(len(images)).long(), 1))


def test_augment_gives_shifted_and_flipped_copies() -> None:
    """Against the definition: each result is one of the 2 x 9 x 9 flips and crops of its own image."""
    images = torch.rand(64, 3, 8, 6) + 0.1
    result = data.augment(images, generator=seeded(0))
    assert result.shape == images.shape
    seen = set()
    for image, augmented in zip(images, result, strict=True):
        padded = torch.nn.functional.pad(image, [4] * 4)
        matches = [
            (flip, top, left)
            for flip in (False, True)
            for top in range(9)
            for left in range(9)
            if torch.equal(
                augmented,
                (padded.flip(-1) if flip else padded)[:, top : top + 8, left : left + 6],
            )
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {flip for flip, _, _ in seen} == {False, True}
    assert {top for _, top, _ in seen} == {left for _, _, left in seen} == set(range(9))


def test_flipped_or_not_images_are_cropped_everywhere() -> None:
    ramp = torch.arange(1.0, 10.0).expand(400, 1, 9, 9)
    rows = data.augment(ramp, generator=torch.Generator().manual_seed(0))[:, 0, 4]
    falls = [bool((row[row > 0].diff() < 0).all()) for row in rows]
    for flipped in (True, False):
        assert len({tuple(row.tolist()) for row, fallen in zip(rows, falls, strict=True) if fallen is flipped}) == 9


def test_augment_is_decided_by_its_generator() -> None:
    images = torch.rand(16, 1, 8, 8)
    before = torch.get_rng_state()
    first = data.augment(images, generator=seeded(0))
    assert torch.equal(first, data.augment(images, generator=seeded(0)))
    assert not torch.equal(first, data.augment(images, generator=seeded(1)))
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(DataError, match=r"\(16, 64\).*before flattening"):
        data.augment(images.flatten(1), generator=seeded(0))


def real_data(below: str) -> Path:
    """Return the folder of the real sets, or skip."""
    root = os.environ.get("PCSIM_DATA")
    if root is None or not (Path(root) / below).is_dir():
        pytest.skip(f"the environment variable PCSIM_DATA names no folder with {below}")
    return Path(root)


def test_real_mnist() -> None:
    train, test = data.mnist(real_data("MNIST/raw"))
    assert (len(train), len(test)) == (60000, 10000)
    assert train.labels.unique().tolist() == list(range(10))
    assert train.images.mean().item() == pytest.approx(0.1307, abs=1e-4)


def test_real_cifar10() -> None:
    train, test = data.cifar10(real_data("cifar-10-batches-py"))
    assert train.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    assert train.images.mean((0, 2, 3)).tolist() == pytest.approx(data.CIFAR10_MEAN, abs=2e-3)
