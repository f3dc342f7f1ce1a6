"""What a corpus is made of: pieces of files, each in one of two splits, with the SHA-256 of every file."""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ..core.errors import UserError

__all__ = ["CHUNK", "Examined", "Piece", "Source", "Split", "chunks", "examine", "held_out"]

Split = Literal["train", "valid"]
CHUNK = 1 << 20  # bytes read and tokenised at once
MAX_UNDECODABLE = 0.1  # share of bytes that are no UTF-8, above which a file counts as binary


@dataclasses.dataclass(frozen=True)
class Piece:
    """Bytes start..stop of one file. name: path relative to the corpus, as recorded. sha256: of the whole file."""

    path: Path
    name: str
    sha256: str
    start: int
    stop: int
    split: Split


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus before tokenising. skipped: reason -> number of files left out. title: for people."""

    title: str
    pieces: tuple[Piece, ...]
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Examined(NamedTuple):
    """What one look at a file says. binary: why it is no text, or an empty string."""

    sha256: str
    size: int
    binary: str


def examine(path: Path) -> Examined:
    """Read a file once, in pieces: its SHA-256, size, and whether it is text (no NUL byte, mostly valid UTF-8)."""
    digest, size, bad, nul = hashlib.sha256(), 0, 0, False
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
            size += len(block)
            nul = nul or b"\0" in block
            if not nul and not block.isascii():
                bad += decoder.decode(block).count("\ufffd") - block.count(b"\xef\xbf\xbd")
    binary = "NUL bytes" if nul else "not UTF-8" if bad > MAX_UNDECODABLE * size else ""
    return Examined(digest.hexdigest(), size, binary)


def held_out(sizes: Mapping[str, int], low: float, high: float) -> set[str]:
    """Names held out for validation: in the order of a hash of their name, until `low` of all bytes are reached.

    A name that would take more than `high` in total is passed over; the choice depends on names and sizes only.
    """
    total, taken, chosen = sum(sizes.values()), 0, set[str]()
    for name in sorted(sizes, key=lambda n: hashlib.sha256(f"moestro:{n}".encode(errors="surrogateescape")).digest()):
        if taken >= low * total:
            break
        if taken + sizes[name] <= high * total:
            chosen.add(name)
            taken += sizes[name]
    return chosen


def chunks(piece: Piece) -> Iterator[bytes]:
    """The bytes of a piece in chunks of about a megabyte, cut after a line where there is one, never inside UTF-8.

    Raises `UserError` when the file is no longer what `examine` saw.
    """
    left, rest = piece.stop - piece.start, b""
    with piece.path.open("rb") as file:
        file.seek(piece.start)
        while left or rest:
            block = file.read(min(CHUNK, left))
            if len(block) < min(CHUNK, left):
                raise UserError(f"{piece.path}: the file changed while it was read; run the command again")
            left -= len(block)
            rest += block
            cut = len(rest) if not left else cut_before(rest)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]


def cut_before(text: bytes) -> int:
    """Where to cut: after the last line; without lines, before an unfinished UTF-8 character (0 = nowhere)."""
    newline = text.rfind(b"\n")
    if newline >= 0:
        return newline + 1
    end = len(text)
    for back in range(1, min(4, end) + 1):
        byte = text[end - back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return end - back if back < length else end
        if byte < 0x80:
            break
    return end


def identity(pieces: Sequence[Piece]) -> list[list[str | int]]:
    """What makes two corpora the same text in the same order."""
    return [[p.name, p.sha256, p.start, p.stop, p.split] for p in pieces]


def name_of(path: Path, root: Path) -> str:
    """The path relative to `root`, with forward slashes."""
    return os.path.relpath(path, root).replace(os.sep, "/")
