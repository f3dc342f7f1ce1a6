"""Examples from a user's own files: rows of JSON, TSV or CSV, questions in SQuAD's format. Errors name the line."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..core.errors import UserError
from .data.augment import Eda
from .data.examples import DataSet, Labelled, Pair, SpanQuestion, Translation
from .data.read import text
from .data.spans import questions
from .data.split import hold_out
from .data.synonyms import with_copies
from .material import Examples, LabelledTexts, SpanQuestions, TextPairs, Translations

__all__ = ["files_of", "labelled", "pairs", "span_questions", "translations"]

T = TypeVar("T")

KINDS = (".jsonl", ".json", ".tsv", ".csv")
_SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
_TRUE, _FALSE = ("1", "true", "yes"), ("0", "false", "no")


def translations(config: Translations) -> DataSet[Translation]:
    """Rows source, target (and domain)."""

    def made(row: _Row, domains: dict[str, int]) -> Translation:
        return Translation(row.text("source"), row.text("target"), row.number("domain", domains))

    return _data_set(config, Translation, made, lambda example: example.source)


def labelled(config: LabelledTexts) -> DataSet[Labelled]:
    """Rows text, label (and domain). Labels that are whole numbers keep their order, others are sorted by name."""
    if config.published is not None and not config.path:
        return _published(config, Labelled)
    parts = _parts(config)
    names = _names(row.name("label") for rows in parts.values() for row in rows)
    labels = {name: i for i, name in enumerate(names)}

    def made(row: _Row, domains: dict[str, int]) -> Labelled:
        return Labelled(row.text("text"), labels[row.name("label")], row.number("domain", domains))

    found = _split(config, parts, made, lambda example: example.text, lambda example: example.label)
    return dataclasses.replace(found, labels=names)


def pairs(config: TextPairs) -> DataSet[Pair]:
    """Rows a, b (and domain, similar)."""

    def made(row: _Row, domains: dict[str, int]) -> Pair:
        return Pair(row.text("a"), row.text("b"), row.truth("similar"), row.number("domain", domains))

    return _data_set(config, Pair, made, lambda example: example.a)


def span_questions(config: SpanQuestions) -> DataSet[SpanQuestion]:
    """SQuAD's JSON, or rows of JSON with a context or a question each."""
    found = _questions(config)
    if not config.copies:
        return found
    eda = Eda(synonyms=config.replaced, deletions=config.deleted, copies=config.copies)
    return dataclasses.replace(found, train=with_copies(found.train, eda, config.synonyms))


def _questions(config: SpanQuestions) -> DataSet[SpanQuestion]:
    if config.published is not None and not config.path:
        return _published(config, SpanQuestion)
    parts: dict[str, list[SpanQuestion]] = {}
    for split, paths in files_of(config).items():
        for path in paths:
            if not path.name.removesuffix(".gz").endswith((".json", ".jsonl")):
                raise UserError(f"{path}: questions are JSON in SQuAD's format, or rows of JSON (.jsonl)")
            parts.setdefault(split, []).extend(questions(path))
    return _held_out(config, parts, lambda example: example.context)


# Files ------------------------------------------------------------------------------------------------------------


def files_of(config: Examples) -> dict[str, list[Path]]:
    """split -> its files, sorted. Raises `UserError` where there is nothing that could be read."""
    name = type(config).__name__
    if not config.path:
        raise UserError(
            f"{name}: no examples; name a file or folder with rows of {', '.join(config.fields)} (moestro train --data)"
        )
    root = Path(config.path).expanduser()
    if root.is_file():
        if not _readable(root):
            raise UserError(f"{root}: not one of {', '.join(KINDS)} (also with .gz), which examples are read from")
        return {"train": [root]}
    if not root.is_dir():
        raise UserError(f"{config.path}: no such file or folder; check the path given as data")
    found = sorted(path for path in root.iterdir() if path.is_file() and _readable(path))
    if not found:
        raise UserError(
            f"{root}: no file here ends in {', '.join(KINDS)}; put rows of {', '.join(config.fields)} there"
        )
    split = {s: [p for p in found if p.name.split(".")[0].lower() in names] for s, names in _SPLITS.items()}
    return {s: paths for s, paths in split.items() if paths} if split["train"] else {"train": found}


def _readable(path: Path) -> bool:
    return not path.name.startswith(".") and path.name.removesuffix(".gz").lower().endswith(KINDS)


class _Row:
    """One row of a file. where: its file and line, for messages."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{where}: no object with named fields, such as {{...}}")
        self.values, self.where = values, where

    def _get(self, name: str) -> Any:
        if self.values.get(name) is None:
            known = ", ".join(str(k) for k in self.values if k is not None)
            raise UserError(f"{self.where}: no {name!r} (found {known or 'nothing'})")
        return self.values[name]

    def text(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.where}: {name} should be a text, found {value!r}")
        return value.strip()

    def name(self, name: str) -> str:
        """A name or a whole number, as text."""
        value = self._get(name)
        if isinstance(value, bool | int):
            value = str(int(value))
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.where}: {name} should be a name or a whole number, found {value!r}")
        return value.strip()

    def number(self, name: str, known: dict[str, int]) -> int:
        """The number of a name that may be missing, which is the first then."""
        return known[self.name(name)] if name in self.values else 0

    def truth(self, name: str) -> bool:
        """True where it is missing."""
        said = self.name(name).lower() if name in self.values else "1"
        if said not in _TRUE + _FALSE:
            raise UserError(f"{self.where}: {name} should be 1 or 0, found {said!r}")
        return said in _TRUE


def _rows(path: Path, fields: Sequence[str]) -> Iterator[_Row]:
    said, kind = text(path), path.name.removesuffix(".gz").lower()
    if kind.endswith(".jsonl"):
        for number, line in enumerate(said.split("\n"), 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield _Row(json.loads(line), where)
                except (json.JSONDecodeError, RecursionError):
                    raise UserError(f"{where}: no JSON") from None
    elif kind.endswith(".json"):
        try:
            values = json.loads(said)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: no JSON ({error})") from None
        if not isinstance(values, list):
            raise UserError(f"{path}: no list of objects with {', '.join(fields)}")
        yield from (_Row(value, f"{path}, entry {number}") for number, value in enumerate(values, 1))
    else:
        yield from _table(path, said, "\t" if kind.endswith(".tsv") else ",", fields)


def _table(path: Path, said: str, delimiter: str, fields: Sequence[str]) -> Iterator[_Row]:
    """Rows of a table; its first line names the columns. TSV has no quotes."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(said, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        head = [name.strip() for name in next(reader, [])]
        for name in fields:
            if name not in head:
                raise UserError(
                    f"{path}, line 1: no column {name!r} (found {', '.join(head) or 'nothing'}); the first line names "
                    "the columns"
                )
        for row in reader:
            if any(row):
                if len(row) != len(head):
                    where = f"{path}, line {reader.line_num}"
                    raise UserError(f"{where}: {len(row)} columns, the first line names {len(head)}")
                yield _Row(dict(zip(head, row)), f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: no table ({error})") from None


# Data sets --------------------------------------------------------------------------------------------------------


def _data_set(
    config: Examples, kind: type[T], made: Callable[[_Row, dict[str, int]], T], key: Callable[[T], str]
) -> DataSet[T]:
    if config.published is not None and not config.path:
        return _published(config, kind)
    return _split(config, _parts(config), made, key)


def _published(config: Examples, kind: type[T]) -> DataSet[T]:
    assert config.published is not None
    found: DataSet[Any] = config.published.build()
    wrong = next((e for e in (*found.train, *found.valid) if not isinstance(e, kind)), None)
    if wrong is not None:
        raise UserError(
            f"{type(config).__name__}.published: {found.title} holds {type(wrong).__name__} examples, not "
            f"{kind.__name__}"
        )
    if not found.train or not found.valid:
        raise UserError(
            f"{type(config).__name__}.published: {found.title} has nothing to train on, or nothing held out"
        )
    return found


def _parts(config: Examples) -> dict[str, list[_Row]]:
    return {split: [r for p in paths for r in _rows(p, config.fields)] for split, paths in files_of(config).items()}


def _split(
    config: Examples,
    parts: dict[str, list[_Row]],
    made: Callable[[_Row, dict[str, int]], T],
    key: Callable[[T], str],
    stratum: Callable[[T], Any] = lambda example: 0,
) -> DataSet[T]:
    every = [row for rows in parts.values() for row in rows]
    named = [row for row in every if "domain" in row.values]
    if named and len(named) < len(every):
        lacking = next(row for row in every if "domain" not in row.values)
        raise UserError(f"{lacking.where}: no 'domain', which other rows have; name it in all rows or in none")
    names = _names(row.name("domain") for row in named)
    domains = {name: i for i, name in enumerate(names)}
    found = {split: [made(row, domains) for row in rows] for split, rows in parts.items()}
    return dataclasses.replace(_held_out(config, found, key, stratum), domains=names or ("all",))


def _held_out(
    config: Examples,
    parts: dict[str, list[T]],
    key: Callable[[T], str],
    stratum: Callable[[T], Any] = lambda example: 0,
) -> DataSet[T]:
    """The data set, with a share of every stratum of the training examples held out where no file is for that."""
    train = parts.get("train", [])
    valid = parts.get("valid", [])
    if not valid:
        strata: dict[Any, list[T]] = {}
        for example in train:
            strata.setdefault(stratum(example), []).append(example)
        kept = [hold_out(rows, config.validation, 0.0, key) for _, rows in sorted(strata.items())]
        if not any(part[1] for part in kept):  # few examples: one of them all
            kept = [hold_out(train, 1 / max(1, len({key(example) for example in train})), 0.0, key)]
        train, valid = ([e for part in kept for e in part[i]] for i in (0, 1))
    if not train or not valid:
        raise UserError(
            f"{config.path}: {len(train)} examples to learn from and {len(valid)} held out; needs at least one of each"
        )
    return DataSet(Path(config.path).name, tuple(train), tuple(valid), tuple(parts.get("test", ())), domains=("all",))


def _names(found: Any) -> tuple[str, ...]:
    """Different names, sorted: as numbers where all are whole numbers."""
    names = set(found)
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
