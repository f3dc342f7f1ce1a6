"""Rules: how our tensors and those of a published layout correspond, both ways, as data.

A name pattern holds `{layer}` (any number, the same wherever it appears), `{name}` (any text) and, on their side,
`{expert}` (0 to E-1, where E is the first axis of ours). A rule says which box of ours equals which box of theirs;
reading and writing follow from that in `boxes.py`. `ours` equals `steps` applied, in order, to theirs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...core.errors import UserError

__all__ = [
    "ByExpert",
    "Copy",
    "Fuse",
    "Ignored",
    "Interleaved",
    "Invented",
    "Link",
    "Reshape",
    "Rule",
    "Split",
    "Stack",
    "StackFuse",
    "Step",
    "Table",
    "Transpose",
]

_MOST_EXPERTS = 100_000
Box = tuple[tuple[int, int], ...]
"""(start, stop) along every axis."""


def whole(shape: tuple[int, ...]) -> Box:
    return tuple((0, n) for n in shape)


# Steps --------------------------------------------------------------------------------------------------------------


class Step(Protocol):
    """An invertible change of one tensor: `ours` of theirs, and `theirs` of ours."""

    def ours(self, tensor: Tensor) -> Tensor: ...

    def theirs(self, tensor: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Transpose:
    """Two axes change places."""

    a: int = -2
    b: int = -1

    def ours(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(self.a, self.b)

    theirs = ours


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """Theirs alternates `parts` pieces along an axis (gate, up, gate, up, ...); ours has them one after the other."""

    axis: int
    parts: int = 2

    def ours(self, tensor: Tensor) -> Tensor:
        axis = self.axis % tensor.ndim
        return tensor.unflatten(axis, (-1, self.parts)).transpose(axis, axis + 1).flatten(axis, axis + 1)

    def theirs(self, tensor: Tensor) -> Tensor:
        axis = self.axis % tensor.ndim
        return tensor.unflatten(axis, (self.parts, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1)


@dataclasses.dataclass(frozen=True)
class Reshape:
    """The same entries in another shape; at most one size of each is -1."""

    to_ours: tuple[int, ...]
    to_theirs: tuple[int, ...]

    def ours(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.to_ours)

    def theirs(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.to_theirs)


# Links --------------------------------------------------------------------------------------------------------------


class Link(NamedTuple):
    """A box of one of ours equals `steps` of a box of one of theirs (None: of all of theirs).

    ours_box is in our coordinates; squeeze: whether its first axis, of one entry, is taken off before comparing.
    """

    ours: str
    ours_box: Box
    theirs: str
    theirs_box: Box | None = None
    steps: tuple[Step, ...] = ()
    squeeze: bool = False


Shapes = Mapping[str, tuple[int, ...]]
Names = Mapping[str, str]
"""Values of the placeholders."""


class Rule:
    """Base of rules. `patterns`: those of our names, which the rule needs all or none of."""

    @property
    def patterns(self) -> tuple[str, ...]:
        raise NotImplementedError

    def links(self, names: Names, shapes: Shapes) -> Iterator[Link]:
        """The links of one match. shapes: of ours. Raises `UserError` where ours does not divide as the rule says."""
        raise NotImplementedError


def fill(pattern: str, names: Names, **more: object) -> str:
    for key, value in {**names, **more}.items():
        pattern = pattern.replace(f"{{{key}}}", str(value))
    return pattern


_KINDS = {"layer": r"\d+", "expert": r"\d+", "name": r".+"}


def regex(pattern: str) -> re.Pattern[str]:
    """A regular expression with one named group per placeholder."""
    seen: set[str] = set()

    def group(found: re.Match[str]) -> str:
        key = found[1]
        if key in seen:
            return f"(?P={key})"
        seen.add(key)
        return f"(?P<{key}>{_KINDS[key]})"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", group, re.escape(pattern)))


@dataclasses.dataclass(frozen=True)
class Copy(Rule):
    """The same tensor under another name."""

    ours: str
    theirs: str
    steps: tuple[Step, ...] = ()

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.ours,)

    def links(self, names: Names, shapes: Shapes) -> Iterator[Link]:
        name = fill(self.ours, names)
        yield Link(name, whole(shapes[name]), fill(self.theirs, names), None, self.steps)


@dataclasses.dataclass(frozen=True)
class ByExpert(Copy):
    """The same stack of experts under another name; steps run on one expert [1, ...] at a time: only one is held
    twice."""

    def links(self, names: Names, shapes: Shapes) -> Iterator[Link]:
        name = fill(self.ours, names)
        E, *rest = shapes[name]
        theirs = whole(shape_through((1, *rest), self.steps, inverse=True))
        for e in range(E):
            box, their_box = (replaced(b, 0, (e, e + 1)) for b in (whole(shapes[name]), theirs))
            yield Link(name, box, fill(self.theirs, names), their_box, self.steps)


@dataclasses.dataclass(frozen=True)
class _Concatenated(Rule):
    """Several of theirs, one after the other along `axis`, of equal size unless `sizes` gives their proportions."""

    ours: str
    theirs: tuple[str, ...]
    axis: int = 0
    steps: tuple[Step, ...] = ()
    sizes: tuple[int, ...] | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.ours,)


@dataclasses.dataclass(frozen=True)
class Fuse(_Concatenated):
    """Ours is the concatenation of several of theirs, of equal size unless `sizes` gives their proportions."""

    def links(self, names: Names, shapes: Shapes) -> Iterator[Link]:
        name = fill(self.ours, names)
        box = whole(shapes[name])
        for theirs, part in zip(self.theirs, cut(box, self.axis, self.sizes or (1,) * len(self.theirs), name)):
            yield Link(name, part, fill(theirs, names), None, self.steps)


@dataclasses.dataclass(frozen=True)
class Split(Rule):
    """Theirs is the concatenation of several of ours (a fused projection), in the sizes that ours have."""

    ours: tuple[str, ...]
    theirs: str
    axis: int = 0

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.ours

    def links(self, names: Names, shapes: Shapes) -> Iterator[Link]:
        start = 0
        for pattern in self.ours:
            name = fill(pattern, names)
            box = whole(shapes[name])
            stop = start + shapes[name][self.axis]
            theirs_box = replaced(box, self.axis, (start, stop))
            yield Link(name, box, fill(self.theirs, names), theirs_box)
            start = stop


@dataclasses.dataclass(frozen=True)
class Stack(Rule):
    """Ours [E, ...] stacks theirs, one per expert."""

    ours: str
    theirs: str
    steps: tuple[Step, ...] = ()

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.ours,)

    def links(self, names: Names, shapes: Shapes) -> Iterator[Link]:
        yield from StackFuse(self.ours, (self.theirs,), steps=self.steps).links(names, shapes)


@dataclasses.dataclass(frozen=True)
class StackFuse(_Concatenated):
    """Ours [E, ...] stacks, per expert, the concatenation of several of theirs along `axis` of the expert's tensor."""

    def links(self, names: Names, shapes: Shapes) -> Iterator[Link]:
        name = fill(self.ours, names)
        box = whole(shapes[name])
        if shapes[name][0] > _MOST_EXPERTS:
            raise UserError(f"{name}: {shapes[name][0]} experts are more than {_MOST_EXPERTS}; check the config")
        for e in range(shapes[name][0]):
            one = replaced(box, 0, (e, e + 1))
            for theirs, part in zip(self.theirs, cut(one, self.axis + 1, self.sizes or (1,) * len(self.theirs), name)):
                yield Link(name, part, fill(theirs, names, expert=e), None, self.steps, squeeze=True)


@dataclasses.dataclass(frozen=True)
class Ignored(Rule):
    """Theirs that carry no information of their own. equals: theirs that it must be a bitwise copy of; written: and
    that is copied when exporting, where no rule writes it."""

    theirs: str
    why: str
    equals: str | None = None
    written: bool = False

    @property
    def patterns(self) -> tuple[str, ...]:
        return ()


@dataclasses.dataclass(frozen=True)
class Invented(Rule):
    """Ours without a source: it is `value` everywhere. Exporting loses it, so it must still be `value` then."""

    ours: str
    why: str
    value: float = 0.0

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.ours,)

    def links(self, names: Names, shapes: Shapes) -> Iterator[Link]:
        return iter(())


Table = tuple[Rule, ...]


def replaced(box: Box, axis: int, span: tuple[int, int]) -> Box:
    axis %= len(box)
    return (*box[:axis], span, *box[axis + 1 :])


def cut(box: Box, axis: int, sizes: tuple[int, ...], name: str) -> list[Box]:
    """Parts of a box along an axis, in the given proportions."""
    axis %= len(box)
    start, stop = box[axis]
    unit, rest = divmod(stop - start, sum(sizes))
    if rest:
        raise UserError(f"{name}: axis {axis} of {stop - start} does not divide into parts of proportions {sizes}")
    out: list[Box] = []
    for size in sizes:
        out.append(replaced(box, axis, (start, start + size * unit)))
        start += size * unit
    return out


def shape_through(shape: tuple[int, ...], steps: tuple[Step, ...], *, inverse: bool) -> tuple[int, ...]:
    """The shape that a tensor of `shape` has after the steps (or after their inverses, in reverse)."""
    probe = torch.empty(shape, device="meta")
    return tuple(run(probe, steps, inverse=inverse).shape)


def run(tensor: Tensor, steps: tuple[Step, ...], *, inverse: bool) -> Tensor:
    for step in reversed(steps) if inverse else steps:
        tensor = step.theirs(tensor) if inverse else step.ours(tensor)
    return tensor
