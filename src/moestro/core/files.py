"""Files that are either whole or not there: written beside, synced, renamed, and sealed with size and SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

__all__ = ["Seal", "replace", "seal", "sync_folder", "write"]

_BLOCK = 1 << 22

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


def replace(path: Path, fill: Callable[[Path], object]) -> Seal:
    """Let `fill` write a file beside `path`, then put it in its place: `path` holds the old file or the whole new one.

    Returns the seal of what was written. Raises `OSError`; what was at `path` is untouched then, and nothing is left.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        fill(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        made = seal(beside)
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)
    return made


def write(path: Path, content: bytes) -> Seal:
    """Write a file as a whole or not at all, see `replace`."""

    def fill(beside: Path) -> None:
        with open_new(beside) as file:
            file.write(content)

    return replace(path, fill)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
