"""Tensors made of boxes of other tensors: only the boxes that are needed are read, when they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .problems import Problems
from .rules import Box, Step, run, whole
from .tensors import Entry, Tensors, finite

__all__ = ["Piece", "View", "read_box"]


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """`into` of a target equals `steps` of `box` of a source tensor (None: all of it).

    inverse: the steps run backwards. drop: the first axis of the box, of one entry, is taken off before the steps;
    add: one is put on after them.
    """

    into: Box
    source: str
    box: Box | None
    steps: tuple[Step, ...] = ()
    inverse: bool = False
    drop: bool = False
    add: bool = False


def read_box(tensors: Tensors, name: str, box: Box) -> Tensor:
    """A box of a tensor, reading no more than it where the source can."""
    boxed = getattr(tensors, "read_box", None)
    return boxed(name, box) if boxed is not None else tensors.read(name)[slices(box)]


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in box)


def overlap(a: Box, b: Box) -> Box | None:
    both = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b))
    return both if all(start < stop for start, stop in both) else None


def moved(box: Box, origin: Sequence[int], to: Sequence[int]) -> Box:
    return tuple((a - o + t, b - o + t) for (a, b), o, t in zip(box, origin, to))


class View:
    """Tensors put together from pieces of a source. `pieces` tile each target without overlapping; `constants` are
    targets that have one value everywhere and no source.

    Reading holds the tensor that is returned and, where a piece has steps, that piece; whole unchanged tensors are
    handed through without a copy.
    """

    def __init__(
        self,
        source: Tensors,
        entries: Mapping[str, Entry],
        pieces: Mapping[str, Sequence[Piece]],
        constants: Mapping[str, float] | None = None,
    ) -> None:
        self._source = source
        self._entries = dict(entries)
        self._pieces = pieces
        self._constants = constants or {}
        self._known = source.entries()
        self._last: tuple[Piece, Tensor] | None = None  # boxes of a changed piece are asked for one after the other

    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, name: str) -> Tensor:
        return self.read_box(name, whole(self._entries[name].shape))

    def read_box(self, name: str, box: Box) -> Tensor:
        shape, dtype = tuple(b - a for a, b in box), self._entries[name].dtype
        if name in self._constants:
            return torch.full(shape, self._constants[name], dtype=dtype)
        found = [(piece, both) for piece in self._pieces[name] if (both := overlap(piece.into, box)) is not None]
        if not shape:
            return self._value(self._pieces[name][0], box)
        if len(found) == 1 and found[0][1] == box:
            return self._value(*found[0])
        out = torch.empty(shape, dtype=dtype)
        for piece, both in found:
            out[slices(moved(both, [a for a, _ in box], [0] * len(box)))].copy_(self._value(piece, both))
        return out

    def read_into(self, name: str, out: Tensor, problems: Problems | None = None) -> None:
        """Copy a tensor into `out`, piece by piece; problems: where to note that it is not finite."""
        if name in self._constants:
            out.fill_(self._constants[name])
            return
        fine = True
        for piece in self._pieces[name]:
            part = self._value(piece, piece.into)
            fine = fine and (problems is None or finite(part))
            out[slices(piece.into)].copy_(part)
        if not fine and problems is not None:
            problems.add("NaN or infinite", name)

    def _value(self, piece: Piece, box: Box) -> Tensor:
        """The part of a piece that makes `box` of the target."""
        if piece.steps:
            if self._last is None or self._last[0] is not piece:
                self._last = None
                self._last = (piece, self._changed(piece))
            inner = moved(box, [a for a, _ in piece.into], [0] * len(box))
            return self._last[1][slices(inner)]
        origin = [a for a, _ in piece.into]
        if piece.add:
            box, origin = box[1:], origin[1:]
        source_box = whole(self._known[piece.source].shape) if piece.box is None else piece.box
        if piece.drop:
            first, source_box = source_box[0], source_box[1:]
            inner = (first, *moved(box, origin, [a for a, _ in source_box]))
        else:
            inner = moved(box, origin, [a for a, _ in source_box])
        value = read_box(self._source, piece.source, inner)
        value = value.squeeze(0) if piece.drop else value
        return value.unsqueeze(0) if piece.add else value

    def _changed(self, piece: Piece) -> Tensor:
        if piece.box is None:
            value = self._source.read(piece.source)
        else:
            value = read_box(self._source, piece.source, piece.box)
        value = value.squeeze(0) if piece.drop else value
        value = run(value, piece.steps, inverse=piece.inverse)
        return value.unsqueeze(0) if piece.add else value
