"""Splits and orders that depend on content alone: the same rows are held out on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

__all__ = ["by_number", "content_number", "hold_out", "shuffled", "tail"]

T = TypeVar("T")


def shuffled(n: int, seed: int, name: str = "") -> list[int]:
    """0..n-1 in an order that is a function of (seed, name): the order of a hash of each number."""
    return sorted(range(n), key=lambda i: (_hash(f"{seed}:{name}:{i}"), i))


def hold_out(
    rows: Iterable[T], validation: float, test: float, key: Callable[[T], str]
) -> tuple[tuple[T, ...], tuple[T, ...], tuple[T, ...]]:
    """Train, validation and test rows. Rows of one key stay together; shares are of keys, in the order of a hash."""
    rows = list(rows)
    keys = sorted({key(row) for row in rows}, key=lambda k: (_hash(k), k))
    border = round(validation * len(keys))
    end = border + round(test * len(keys))
    place = {k: 1 if i < border else 2 if i < end else 0 for i, k in enumerate(keys)}
    found: tuple[list[T], list[T], list[T]] = ([], [], [])
    for row in rows:
        found[place[key(row)]].append(row)
    return tuple(found[0]), tuple(found[1]), tuple(found[2])


def tail(text: str, validation: float, test: float) -> tuple[str, str, str]:
    """One text as train, validation and test, in this order; cut after a line where there is one nearby."""
    first, second = (round(share * len(text)) for share in (1 - validation - test, 1 - test))
    cuts = [_line_end(text, place) for place in (first, second)]
    return text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]


def _line_end(text: str, place: int) -> int:
    if place >= len(text):
        return len(text)
    end = text.rfind("\n", max(0, place - 4096), place)
    return end + 1 if end >= 0 else place


def _hash(text: str) -> bytes:
    return hashlib.sha256(f"moestro:{text}".encode(errors="surrogatepass")).digest()


def by_number(rows: Sequence[str]) -> dict[str, int]:
    """Names in alphabetical order -> their number."""
    return {name: i for i, name in enumerate(sorted(set(rows)))}


def content_number(text: str) -> int:
    """A number of 63 bits of a text that is the same in every process."""
    return int.from_bytes(_hash(text)[:8], "big") >> 1
