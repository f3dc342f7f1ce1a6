"""Writing safetensors files one tensor at a time, in shards with an index, into a folder that is whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...core import files
from ...core.errors import UserError
from .folder import INDEX, SINGLE
from .header import dtype_name
from .problems import Problems
from .tensors import Entry, Tensors, finite

__all__ = ["SHARD_BYTES", "new_folder", "plan_shards", "write_json", "write_tensors"]

SHARD_BYTES = 5_000_000_000
"""Most bytes of a shard, unless one tensor alone is more."""
_BLOCK = 1 << 22


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to fill, which takes its place when the block ends well and is removed when it fails.

    Raises `UserError` where `folder` is a file, or holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; name a new folder, or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if folder.is_dir():
            folder.rmdir()
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    files.sync_folder(folder.parent)


def write_json(path: Path, value: Any) -> None:
    files.write(path, (json.dumps(value, indent=2, allow_nan=False, sort_keys=True) + "\n").encode())


def plan_shards(tensors: Tensors, shard_bytes: int) -> list[list[str]]:
    """Names by shard, in their order; a shard exceeds `shard_bytes` only where it holds one tensor."""
    if shard_bytes < 1:
        raise UserError(f"shard_bytes: {shard_bytes} is below 1")
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, entry in tensors.entries().items():
        if entry.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= entry.nbytes
    return shards


def write_tensors(tensors: Tensors, folder: Path, shard_bytes: int = SHARD_BYTES, where: object = "tensors") -> None:
    """Write all tensors, one file or shards with an index; no more than one tensor is held at a time.

    Raises `UserError` that lists tensors which are not finite.
    """
    shards = plan_shards(tensors, shard_bytes)
    entries = tensors.entries()
    problems = Problems()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, name)
        _write_file(folder / name, tensors, names, problems)
    problems.raise_if_any(where, "Nothing was written; a model with such weights computes nothing")
    if len(shards) > 1:
        size = sum(entry.nbytes for entry in entries.values())
        count = sum(entry.numel for entry in entries.values())
        metadata = {"total_parameters": count, "total_size": size}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _header(entries: Sequence[tuple[str, Entry]]) -> bytes:
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries:
        start, end = end, end + entry.nbytes
        said[name] = {"dtype": dtype_name(entry.dtype), "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_file(path: Path, tensors: Tensors, names: Sequence[str], problems: Problems) -> None:
    entries = tensors.entries()
    ordered = sorted(
        names, key=lambda n: -entries[n].dtype.itemsize
    )  # every tensor lies at a multiple of its item's size
    with files.open_new(path) as file:
        file.write(_header([(name, entries[name]) for name in ordered]))
        for name in ordered:
            tensor = tensors.read(name)
            if Entry(tuple(tensor.shape), tensor.dtype) != entries[name]:
                raise AssertionError(f"{name}: read as {tensor.shape} {tensor.dtype}, announced as {entries[name]}")
            if not finite(tensor):
                problems.add("NaN or infinite", name)
            if not problems:
                _write_data(file, tensor)
        file.flush()
        if not problems:
            os.fsync(file.fileno())


def _write_data(file: BinaryIO, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().view(-1)
    for block in flat.split(_BLOCK) if flat.numel() else ():
        file.write(memoryview(block.view(torch.uint8).numpy()))  # type: ignore[arg-type]
