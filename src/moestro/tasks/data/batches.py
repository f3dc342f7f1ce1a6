"""Padded batches of examples in an order that is a pure function of (seed, step), for any number of ranks.

The width of a batch is that of the whole global batch, so that slices of it have the same shape and the same units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...core.errors import UserError
from ..batches import Batch, permute

__all__ = [
    "AnswerBatch",
    "Collate",
    "ExampleBatches",
    "LabelBatch",
    "PairBatch",
    "SpanBatch",
    "TranslationBatch",
    "epoch_order",
    "moved",
    "padded",
]

M = TypeVar("M")


def moved(batch: M, device: torch.device) -> M:
    """The batch with its tensors on a device."""
    if device.type == "cpu":
        return batch
    tensors = {
        f.name: value.to(device, non_blocking=True)
        for f in dataclasses.fields(batch)  # type: ignore[arg-type]
        if isinstance(value := getattr(batch, f.name), Tensor)
    }
    return dataclasses.replace(batch, **tensors)  # type: ignore[type-var]


class _Movable:
    @property
    def num_tokens(self) -> int:
        """How many tokens it has, without padding."""
        masks = [f.name for f in dataclasses.fields(self) if f.name.endswith("valid")]  # type: ignore[arg-type]
        return sum(int(getattr(self, name).sum()) for name in masks)

    def to(self, device: torch.device) -> Self:
        return moved(self, device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelBatch(_Movable):
    """Texts with a label each.

    Shapes: tokens [B, S] int64; valid [B, S] bool, False = padding; labels, domain [B] int64; unit_id [B*S] int64, the
    token's number in the global batch.
    """

    tokens: Tensor
    valid: Tensor
    labels: Tensor
    domain: Tensor
    unit_id: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslationBatch(_Movable):
    """Sentences and their translations.

    Shapes: source [B, N], tokens, targets [B, S] int64: tokens is what the decoder reads (begins with bos), targets
    what it should say (ends with eos; -1 = padding); source_valid [B, N], valid [B, S] bool; domain [B];
    source_unit_id [B*N], unit_id [B*S].
    """

    source: Tensor
    source_valid: Tensor
    source_unit_id: Tensor
    tokens: Tensor
    targets: Tensor
    valid: Tensor
    domain: Tensor
    unit_id: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanBatch(_Movable):
    """Windows of [cls] question [sep] context [sep] with the first and last token of an answer.

    Shapes: tokens, matched [B, S] int64 (matched: 1 where the token's text occurs in the other part too); valid,
    context [B, S] bool (context: where an answer may be); start, end [B] int64, 0 (the cls) where there is no answer;
    domain, example [B] int64 (example: number of the question that the window belongs to); unit_id [B*S].
    """

    tokens: Tensor
    matched: Tensor
    valid: Tensor
    context: Tensor
    start: Tensor
    end: Tensor
    domain: Tensor
    example: Tensor
    unit_id: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairBatch(_Movable):
    """Pairs of texts.

    Shapes: a [B, N], b [B, M] int64; a_valid, b_valid bool alike; similar [B] bool; domain [B] int64; a_unit_id [B*N],
    b_unit_id [B*M] int64: no number is used twice.
    """

    a: Tensor
    a_valid: Tensor
    a_unit_id: Tensor
    b: Tensor
    b_valid: Tensor
    b_unit_id: Tensor
    similar: Tensor
    domain: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerBatch(Batch):
    """Prompts with answers for a language model; only answers are targets.

    Shapes: tokens, targets [B, S] (-1 = prompt or padding); valid [B, S] bool; answer_bytes, domain [B] int64.
    """

    valid: Tensor
    answer_bytes: Tensor
    domain: Tensor

    def to(self, device: torch.device) -> Self:
        return moved(self, device)


class Collate(Protocol):
    """Turns examples into a batch. `encode` is called once per example, `pad` once per batch."""

    def encode(self, example: Any) -> Any: ...

    def pad(self, encoded: Sequence[Any], rows: slice) -> Any:
        """The rows of the batch of all `encoded`, as wide as the widest of them all."""
        ...


class ExampleBatches:
    """Batches of a list of examples. Raises `UserError` where there are none.

    pool: so many batches are drawn together and dealt by length, so that less of them is padding; which of them comes
    first is drawn too.
    """

    def __init__(self, examples: Sequence[Any], collate: Any, seed: int = 0, pool: int = 1) -> None:
        if not examples:
            raise UserError("no examples to make batches of; is this split empty?")
        if pool < 1:
            raise UserError(f"pool must be at least 1 batch, found {pool}")
        self.examples, self.collate, self.seed, self.pool = examples, collate, seed, pool
        self._encoded: dict[int, Any] = {}

    def numbers(self, step: int, size: int) -> np.ndarray:
        """[size] int64: which examples the global batch of this step holds."""
        turn, place = divmod(step, self.pool)
        found = epoch_order(len(self.examples), self.seed, turn, size * self.pool)
        if self.pool == 1:
            return found
        lengths = np.asarray([_length(self._one(int(i))) for i in found])
        batch = int(epoch_order(self.pool, self.seed + 1, turn, self.pool)[place])
        return found[np.argsort(lengths, kind="stable")].reshape(self.pool, size)[batch]

    def train(self, step: int, size: int, start: int = 0, stop: int | None = None) -> Any:
        """Examples start..stop of the global batch of `size` examples of this step."""
        return self._made(self.numbers(step, size), slice(start, size if stop is None else stop))

    def each(self, size: int, limit: int | None = None) -> Iterator[tuple[np.ndarray, Any]]:
        """(numbers, batch) of every example once, in order, in batches of at most `size`; at most `limit` examples."""
        count = len(self.examples) if limit is None else min(limit, len(self.examples))
        for first in range(0, count, size):
            numbers = np.arange(first, min(first + size, count))
            yield numbers, self.of(numbers)

    def of(self, numbers: np.ndarray) -> Any:
        """The batch of these examples."""
        return self._made(numbers, slice(0, len(numbers)))

    def _made(self, numbers: np.ndarray, rows: slice) -> Any:
        return self.collate.pad([self._one(int(i)) for i in numbers], rows)

    def _one(self, number: int) -> Any:
        if number not in self._encoded:
            self._encoded[number] = self.collate.encode(self.examples[number])
        return self._encoded[number]


def _length(encoded: Any) -> int:
    """Tokens of an encoded example: of its lists of ids."""
    parts = encoded if isinstance(encoded, tuple) else vars(encoded).values()
    return sum(len(part) for part in parts if isinstance(part, list))


def epoch_order(n: int, seed: int, step: int, size: int) -> np.ndarray:
    """[size] int64: the numbers below n that step `step` takes. Every epoch takes each once, in an order of its own."""
    epoch, place = np.divmod(np.arange(size, dtype=np.int64) + step * size, n)
    out = np.empty(size, dtype=np.int64)
    for e in np.unique(epoch):
        here = epoch == e
        out[here] = permute(place[here], n, (seed * 0x9E3779B97F4A7C15 + int(e) * 0xD1B54A32D192ED03) % (1 << 63))
    return out


def padded(rows: Sequence[Sequence[int]], fill: int, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The `part` of rows: values [B, S] int64, valid [B, S] bool, unit_id [B*S] int64; S is that of the longest row."""
    width = max(1, max(map(len, rows)))
    chosen = rows[part]
    values = np.full((len(chosen), width), fill, dtype=np.int64)
    valid = np.zeros((len(chosen), width), dtype=bool)
    for i, row in enumerate(chosen):
        values[i, : len(row)] = row
        valid[i, : len(row)] = True
    first = range(len(rows))[part].start
    units = torch.arange(first * width, (first + len(chosen)) * width)
    return torch.from_numpy(values), torch.from_numpy(valid), units


def whole(values: Sequence[int]) -> Tensor:
    """[n] int64."""
    return torch.tensor(list(values), dtype=torch.int64)
