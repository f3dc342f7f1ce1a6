"""Examples ready for training: a data set with its vocabulary, and the batches that runs ask for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..core.errors import UserError
from .data.batches import ExampleBatches
from .data.collate import LabelTexts, PairedTexts, TranslatedTexts
from .data.examples import DataSet, Labelled, Pair, SpanQuestion, Translation
from .data.vocabulary import TextVocabulary
from .data.windows import SpanWindows, make_windows
from .material import Examples, LabelledTexts, SpanQuestions, TextPairs, Translations
from .own import files_of
from .source import examine

__all__ = ["ExampleFeed", "Prepared", "prepare_examples"]

SCHEMA = 1


class ExampleFeed:
    """Training and held-out examples as `batches.Feed`. seq_len: the most tokens of an example."""

    def __init__(self, train: ExampleBatches, held_out: ExampleBatches, seq_len: int) -> None:
        self.examples, self.held_out, self.seq_len = train, held_out, seq_len

    def train(self, step: int, size: int, start: int = 0, stop: int | None = None) -> Any:
        return self.examples.train(step, size, start, stop)

    def valid_windows(self, limit: int) -> np.ndarray:
        """Evenly spaced."""
        count = len(self.held_out.examples)
        n = min(limit, count)
        return np.arange(n, dtype=np.int64) * count // n

    def valid(self, starts: np.ndarray, first: int = 0) -> Any:
        """No token has a number that one of another batch has."""
        batch = self.held_out.of(starts)
        apart = 2 * self.seq_len * first  # pairs have two texts
        moved = {f.name: getattr(batch, f.name) + apart for f in dataclasses.fields(batch) if "unit_id" in f.name}
        return dataclasses.replace(batch, **moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A data set in the splits that are trained and evaluated on. key: its identity. record: for `corpus.json`."""

    config: Examples
    data: DataSet[Any]
    vocabulary: TextVocabulary
    key: str
    record: dict[str, Any]

    def feed(self, seq_len: int, seed: int) -> ExampleFeed:
        """Batches of examples of at most `seq_len` tokens, in an order that is a function of the seed."""
        examples, collate = _collated(self, seq_len)
        for name, rows in examples.items():
            if not rows:
                raise UserError(f"{self.data.title}: no {name} example with an answer fits into {seq_len} tokens")
        train = ExampleBatches(examples["training"], collate, seed, self.config.pool)
        return ExampleFeed(train, ExampleBatches(examples["validation"], collate, seed), seq_len)


def prepare_examples(config: Examples, vocabulary: TextVocabulary | None = None) -> Prepared:
    """Read the examples and make their vocabulary, unless it is given. Raises `UserError` for unusable files."""
    data: DataSet[Any] = config.build()
    skipped = {}
    if isinstance(config, TextPairs):
        similar = {name: tuple(e for e in getattr(data, name) if e.similar) for name in ("train", "valid")}
        skipped["unrelated pairs"] = len(data.train) + len(data.valid) - sum(map(len, similar.values()))
        data = dataclasses.replace(data, **similar)
    if not data.train or not data.valid:
        raise UserError(f"{data.title}: {len(data.train)} examples to learn from and {len(data.valid)} held out")
    if vocabulary is None:
        vocabulary = config.vocabulary.build(_texts(data), more=_names(config, data))
    assert vocabulary is not None
    key = _key(config, data, vocabulary)
    paths = [p for ps in files_of(config).values() for p in ps] if config.path else []
    record = {
        "schema": SCHEMA,
        "title": data.title,
        "key": key,
        "kind": config.type_name(),
        "vocabulary": vocabulary.key,
        "vocab_size": vocabulary.size,
        "splits": {"train": {"examples": len(data.train)}, "valid": {"examples": len(data.valid)}},
        "labels": list(data.labels),
        "domains": list(data.domains),
        "skipped": skipped,
        "files": [{"name": path.name, "sha256": examine(path).sha256} for path in paths],
    }
    return Prepared(config=config, data=data, vocabulary=vocabulary, key=key, record=record)


def _names(config: Examples, data: DataSet[Any]) -> tuple[str, ...]:
    """Special tokens besides those that every vocabulary has."""
    tokens = isinstance(config, TextPairs) and config.domain_tokens
    return tuple(f"<{name}>" for name in data.domains) if tokens else ()


def _texts(data: DataSet[Any]) -> Iterator[str]:
    """All text of the training examples, that of a context once."""
    contexts: set[str] = set()
    for example in data.train:
        if isinstance(example, Translation):
            yield from (example.source, example.target)
        elif isinstance(example, Labelled):
            yield example.text
        elif isinstance(example, Pair):
            yield from (example.a, example.b)
        elif isinstance(example, SpanQuestion):
            yield example.question
            if example.context not in contexts:
                contexts.add(example.context)
                yield example.context


def _collated(made: Prepared, seq_len: int) -> tuple[dict[str, Any], Any]:
    """(training and validation examples, how they become batches)."""
    config, vocabulary = made.config, made.vocabulary
    rows: dict[str, Any] = {"training": made.data.train, "validation": made.data.valid}
    if isinstance(config, SpanQuestions):
        some = not config.unanswered
        cut = {n: make_windows(part, vocabulary, seq_len, config.stride, answered=some) for n, part in rows.items()}
        return cut, SpanWindows(vocabulary)
    if isinstance(config, TextPairs):
        return rows, PairedTexts(vocabulary, seq_len, _names(config, made.data), config.swap)
    if isinstance(config, LabelledTexts):
        return rows, LabelTexts(vocabulary, seq_len)
    if isinstance(config, Translations):
        return rows, TranslatedTexts(vocabulary, seq_len)
    raise UserError(f"{type(config).__name__} is only a base; choose a kind of examples")


def _key(config: Examples, data: DataSet[Any], vocabulary: TextVocabulary) -> str:
    """Of everything that decides what batches hold."""
    kept = {"path": "", "published": None, "validation": 0.5, "vocabulary": type(config)().vocabulary}
    digest = hashlib.sha256(json.dumps([SCHEMA, config.replace(**kept).to_dict(), vocabulary.key]).encode())
    for part in (data.train, data.valid):
        for example in part:
            digest.update(json.dumps(example).encode() + b"\n")
        digest.update(b"\n")
    digest.update(json.dumps([data.labels, data.domains]).encode())
    return digest.hexdigest()[:32]
