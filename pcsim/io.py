"""Files that are whole or not there: trees of tensors and plain values, in safetensors and JSON, without pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from pcsim.errors import FileError

Tree = Any
"""Tensors, numbers, strings, booleans and None, in dictionaries, lists and tuples."""

HEADER, DIGEST = "pcsim", "sha256"
VERSION = 1


def save(path: str | os.PathLike[str], kind: str, tree: Tree) -> None:
    """Write a tree to one file, which replaces an older one only once it is whole.

    Args:
        path: of the file; its folder is made if it is not there.
        kind: what the file holds, such as "training"; :func:`load` asks for it.
        tree: tensors of any device, and plain values; keys of dictionaries are numbers or strings.

    Raises:
        FileError: something in the tree is neither, or the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    header = json.dumps({"kind": kind, "version": VERSION, "tree": _encoded(tree, kind, tensors)})
    try:
        content = safetensors.torch.save(tensors, {HEADER: header, DIGEST: _digest(tensors, header)})
    except (KeyError, ValueError) as error:
        raise FileError(
            f"{kind}: a tensor is of a type that safetensors does not hold ({error}); convert it"
        ) from error
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f".{file.name}.part")  # one name, so that what a kill leaves is overwritten
        try:
            with scratch.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(scratch, file)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise FileError(f"{file}: cannot be written ({error}); check the folder and the space left") from error


def load(path: str | os.PathLike[str], kind: str) -> Tree:
    """The tree of a file that :func:`save` wrote; its tensors are on the CPU.

    Args:
        path: of the file.
        kind: what it must hold.

    Raises:
        FileError: it is missing, damaged, of another program, or holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise FileError(f"{file}: no such file; check the path")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise FileError(
            f"{file}: is damaged, or no file of pcsim ({error}); give one that pcsim has written"
        ) from error
    if HEADER not in metadata:
        raise FileError(f"{file}: was not written by pcsim, though it holds tensors; give one that pcsim has written")
    if metadata.get(DIGEST) != _digest(tensors, metadata[HEADER]):
        raise FileError(f"{file}: is damaged: its content does not match its checksum; use an older copy")
    header = json.loads(metadata[HEADER])
    if header["version"] != VERSION:
        raise FileError(f"{file}: has version {header['version']} of the format, expected {VERSION}; update pcsim")
    if header["kind"] != kind:
        raise FileError(f"{file}: holds {header['kind']!r}, expected {kind!r}; give a file of that kind")
    return _decoded(header["tree"], tensors)


def _digest(tensors: Mapping[str, Tensor], header: str) -> str:
    # One entry of metadata, since safetensors writes several in no fixed order.
    return hashlib.sha256(safetensors.torch.save(dict(tensors), {HEADER: header})).hexdigest()


def _encoded(tree: Tree, place: str, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON: tensors and what JSON has no word for are marked by the one key of a dictionary."""
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(tree, list | tuple):
        items = [_encoded(item, f"{place}[{number}]", tensors) for number, item in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    if isinstance(tree, Mapping) and all(isinstance(key, str | int) for key in tree):
        return {"items": [[key, _encoded(item, f"{place}.{key}", tensors)] for key, item in tree.items()]}
    raise FileError(
        f"{place} is a {type(tree).__name__}, expected a tensor or a plain value; it cannot be kept in a file"
    )


def _decoded(tree: Any, tensors: Mapping[str, Tensor]) -> Tree:
    if isinstance(tree, list):
        return [_decoded(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "tuple" in tree:
        return tuple(_decoded(item, tensors) for item in tree["tuple"])
    return {key: _decoded(item, tensors) for key, item in tree["items"]}


def check_state(path: str | os.PathLike[str], what: str, own: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    """Refuse tensors that do not fit those that are there, before any is replaced.

    Raises:
        FileError: a name is missing or unknown, or a shape differs.
    """
    for name in [*own, *(name for name in found if name not in own)]:
        shapes = [tuple(part[name].shape) if name in part else None for part in (own, found)]
        if shapes[0] != shapes[1]:
            ours, theirs = ("nothing" if shape is None else str(shape) for shape in shapes)
            raise FileError(
                f"{path}: {what} {name!r} has {theirs} there and {ours} here; give the file of this network"
            )
