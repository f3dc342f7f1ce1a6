"""The default corpus: the source text of Python's standard library, which every machine has."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from pathlib import Path

from ..core.errors import UserError
from .config import StandardLibrary
from .source import Piece, Source, held_out, name_of

__all__ = ["find", "near_duplicates"]

_LEFT_OUT = {
    *("test", "tests", "idle_test", "turtledemo"),
    *("encodings", "pydoc_data", "lib-dynload", "__pycache__"),
    *("site-packages", "dist-packages"),
}
_SHINGLE = 5  # consecutive lines
_SAME = 0.6  # share of a file's shingles found in one other file, from which it is a near-duplicate
_SMALLEST = 64  # bytes


def find(config: StandardLibrary, root: Path | None = None) -> Source:
    """List the library's files, without near-duplicates, split by top-level package (8-10 % held out)."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, bytes] = {}
    small = 0
    for folder, below, names in os.walk(root):
        below[:] = sorted(d for d in below if d not in _LEFT_OUT and not d.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                text = path.read_bytes()
                if len(text) < _SMALLEST or b"\0" in text:
                    small += 1
                else:
                    texts[name_of(path, root)] = text
    if not texts:
        raise UserError(f"no source text of the standard library below {root}; name your own text with --data")
    double = near_duplicates(texts)
    kept = {name: text for name, text in sorted(texts.items()) if name not in double}
    sizes: dict[str, int] = {}
    for name, text in kept.items():
        sizes[_package(name)] = sizes.get(_package(name), 0) + len(text)
    valid = held_out(sizes, 0.08, 0.10)
    pieces = [
        Piece(
            root / name,
            name,
            hashlib.sha256(text).hexdigest(),
            0,
            len(text),
            "valid" if _package(name) in valid else "train",
        )
        for name, text in kept.items()
    ]
    title = f"standard library of Python {platform.python_version()}"
    return Source(title, tuple(pieces), {"near-duplicate": len(double), "empty or tiny": small})


def near_duplicates(texts: dict[str, bytes]) -> set[str]:
    """Names of texts most of whose shingles (five lines, without blank ones) stand in one other, not smaller text."""
    owner: dict[bytes, list[int]] = {}
    gone: set[str] = set()
    order = sorted(texts, key=lambda n: (-len(texts[n]), n))
    for number, name in enumerate(order):
        lines = [line.strip() for line in texts[name].splitlines() if line.strip()]
        found = {
            hashlib.blake2b(b"\n".join(lines[i : i + _SHINGLE]), digest_size=8).digest()
            for i in range(max(1, len(lines) - _SHINGLE + 1))
        }
        shared: dict[int, int] = {}
        for shingle in found:
            for other in owner.get(shingle, ()):
                shared[other] = shared.get(other, 0) + 1
        if shared and max(shared.values()) >= _SAME * len(found):
            gone.add(name)
            continue
        for shingle in found:
            owner.setdefault(shingle, []).append(number)
    return gone


def _package(name: str) -> str:
    return name.partition("/")[0].removesuffix(".py")
