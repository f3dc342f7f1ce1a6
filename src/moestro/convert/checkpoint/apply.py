"""A rule table on a pair of models: every tensor of both sides accounted for, or one error that lists what is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from .boxes import Piece, View
from .problems import Problems
from .rules import Box, Ignored, Invented, Link, Rule, Table, fill, regex, shape_through
from .tensors import Entry, Tensors

__all__ = ["Bound", "bind", "to_ours", "to_theirs"]


@dataclasses.dataclass(frozen=True)
class Bound:
    """A table bound to the names of a model. links: by our name. invented: ours without a source."""

    links: Mapping[str, list[Link]]
    invented: Mapping[str, Invented]


def bind(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> Bound:
    """Match every one of our tensors with the one rule that speaks of it.

    Raises `UserError` for tensors that no rule, or more than one, speaks of.
    """
    links: dict[str, list[Link]] = {}
    invented: dict[str, Invented] = {}
    owner: dict[str, Rule] = {}
    problems = Problems()
    for rule in table:
        if not rule.patterns:
            continue
        first = regex(rule.patterns[0])
        for name in shapes:
            found = first.fullmatch(name)
            if found is None:
                continue
            names = found.groupdict()
            group = [fill(pattern, names) for pattern in rule.patterns]
            lacking = [n for n in group if n not in shapes]
            if lacking:
                problems.add("a rule needs beside others of ours", lacking[0])
                continue
            for n in group:
                if n in owner:
                    problems.add("two rules speak of", n)
                owner[n] = rule
            if isinstance(rule, Invented):
                invented[name] = rule
                continue
            for link in rule.links(names, shapes):
                links.setdefault(link.ours, []).append(link)
    for name in shapes:
        if name not in owner:
            problems.add("no rule of this layout speaks of", name)
    problems.raise_if_any("layout", "The model has parts that this family cannot hold")
    return Bound(links, invented)


def _their_shape(link: Link) -> tuple[int, ...]:
    """The shape of the box of theirs that a link speaks of."""
    shape = tuple(b - a for a, b in link.ours_box)
    if link.squeeze:
        shape = shape[1:]
    return shape_through(shape, link.steps, inverse=True) if link.steps else shape


def _their_shapes(links: Iterable[Link]) -> dict[str, tuple[int, ...]]:
    """Whole shapes of theirs, from the boxes that the links speak of."""
    out: dict[str, tuple[int, ...]] = {}
    for link in links:
        if link.theirs_box is None:
            out[link.theirs] = _their_shape(link)
        else:
            ends = tuple(b for _, b in link.theirs_box)
            out[link.theirs] = tuple(map(max, ends, out.get(link.theirs, ends)))
    return out


def to_ours(source: Tensors, table: Table, ours: Mapping[str, Entry], where: object) -> View:
    """Our tensors as a view of theirs, invented ones with the value that their rule gives.

    Raises one `UserError` that lists tensors that are missing, left over, of another shape, or of mixed dtypes.
    """
    bound = bind(table, {name: entry.shape for name, entry in ours.items()})
    theirs = source.entries()
    expected = _their_shapes(link for links in bound.links.values() for link in links)
    problems = Problems()
    for name, shape in expected.items():
        if name not in theirs:
            problems.add("missing", name)
        elif theirs[name].shape != shape:
            problems.add("of another shape", f"{name} ({list(theirs[name].shape)}, the config says {list(shape)})")
    ignored = [(regex(rule.theirs), rule) for rule in table if isinstance(rule, Ignored)]
    for name in theirs.keys() - expected.keys():
        rules = [rule for pattern, rule in ignored if pattern.fullmatch(name)]
        if not rules:
            problems.add("left over", name)
        elif rules[0].equals is not None and not _same(source, name, rules[0].equals):
            problems.add(f"not the copy of {rules[0].equals} that the config says", name)
    entries: dict[str, Entry] = {}
    pieces: dict[str, list[Piece]] = {}
    for name, links in bound.links.items():
        dtypes = {theirs[link.theirs].dtype for link in links if link.theirs in theirs}
        if len(dtypes) > 1:
            problems.add("of several dtypes where one is needed", links[0].theirs)
        entries[name] = Entry(ours[name].shape, next(iter(dtypes), torch.float32))
        pieces[name] = [
            Piece(link.ours_box, link.theirs, link.theirs_box, link.steps, add=link.squeeze) for link in links
        ]
    problems.raise_if_any(where, "The tensors must be those that config.json describes; get the checkpoint again")
    constants = {name: rule.value for name, rule in bound.invented.items()}
    entries |= {name: ours[name] for name in constants}
    return View(source, entries, pieces, constants)


def _same(source: Tensors, name: str, other: str) -> bool:
    entries = source.entries()
    return other in entries and entries[name] == entries[other] and torch.equal(source.read(name), source.read(other))


def to_theirs(source: Tensors, table: Table, where: object) -> View:
    """Their tensors as a view of ours. Raises `UserError` for tensors of ours that the layout cannot hold."""
    ours = source.entries()
    bound = bind(table, {name: entry.shape for name, entry in ours.items()})
    problems = Problems()
    for name, rule in bound.invented.items():
        if bool((source.read(name) != rule.value).any()):
            problems.add("the layout has no place for", name)
    all_links = [link for links in bound.links.values() for link in links]
    shapes = _their_shapes(all_links)
    pieces: dict[str, list[Piece]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for link in all_links:
        into: Box = tuple((0, n) for n in shapes[link.theirs]) if link.theirs_box is None else link.theirs_box
        piece = Piece(into, link.ours, link.ours_box, link.steps, inverse=True, drop=link.squeeze)
        pieces.setdefault(link.theirs, []).append(piece)
        dtype = ours[link.ours].dtype
        if dtypes.setdefault(link.theirs, dtype) != dtype:
            problems.add("of several dtypes where one is needed", link.theirs)
    for rule in table:
        if isinstance(rule, Ignored) and rule.written and rule.equals in shapes and rule.theirs not in shapes:
            shapes[rule.theirs], dtypes[rule.theirs] = shapes[rule.equals], dtypes[rule.equals]
            pieces[rule.theirs] = pieces[rule.equals]
    problems.raise_if_any(where, "Choose another family, or the family moestro, which holds any model")
    return View(source, {name: Entry(shapes[name], dtypes[name]) for name in shapes}, pieces)
