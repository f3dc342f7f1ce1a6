"""Files that are either whole or not there: written beside, synced, renamed, and sealed with size and SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..core.errors import UserError

__all__ = ["Seal", "read_json", "read_tensors", "seal", "sync_folder", "write_json", "write_tensors"]

_BLOCK = 1 << 22
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

open_new: Callable[[Path], BinaryIO] = lambda path: path.open("wb")  # noqa: E731 - replaced by tests of full disks


class Seal(NamedTuple):
    """What a file must be: its size in bytes and the SHA-256 of its content."""

    bytes: int
    sha256: str


def seal(path: Path, size: int | None = None) -> Seal:
    """The seal of a file, or of its first `size` bytes (fewer where it is shorter)."""
    digest, seen = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK if size is None else min(_BLOCK, size - seen)):
            digest.update(block)
            seen += len(block)
    return Seal(seen, digest.hexdigest())


def write(path: Path, parts: Iterable[bytes | memoryview]) -> Seal:
    """Write a file as a whole or not at all. Raises `OSError`; what was at `path` is untouched then."""
    beside = path.with_name(f".{path.name}.new")
    digest, size = hashlib.sha256(), 0
    try:
        with open_new(beside) as file:
            for part in parts:
                file.write(part)
                digest.update(part)
                size += len(part)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)
    return Seal(size, digest.hexdigest())


def write_json(path: Path, value: Any) -> Seal:
    return write(path, [(json.dumps(value, indent=1, allow_nan=False) + "\n").encode()])


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> Seal:
    """Write a safetensors file, streaming: no second copy of the tensors is made in memory."""
    return write(path, _safetensors(tensors, about or {}))


def _safetensors(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    # The format: 8 bytes of header length, a JSON header, then the raw data of all tensors in the header's order.
    # Wider types first, so that each tensor stays aligned.
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(about)}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text))
    yield text
    for name in order:
        raw = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, raw.numel(), _BLOCK):
            yield raw[start : start + _BLOCK].numpy().data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises `UserError` naming the file when it is none."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); restore the file from a copy") from None


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises `UserError` naming the file when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError:
        raise UserError(f"{path}: damaged, it holds no JSON; restore the file from a copy") from None


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
