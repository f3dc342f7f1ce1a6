"""Batches in an order that is a pure function of (seed, step): no matter how many ranks or micro-batches share them.

A training text of n tokens is cut into windows of S + 1 tokens that overlap by one; where the first begins differs
per epoch. Each epoch visits all of them once, in the order of a keyed bijection that needs no memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from .corpus import Corpus

__all__ = ["Batch", "Batches", "Feed", "permute"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Some sequences of a global batch.

    Shapes: tokens, targets [B, S] int64; unit_id [B*S] int64, the token's number in the global batch.
    text_bytes: bytes of text that the targets stand for.
    """

    tokens: Tensor
    targets: Tensor
    unit_id: Tensor
    text_bytes: float

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return self.targets.numel()

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return dataclasses.replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            unit_id=self.unit_id.to(device, non_blocking=True),
        )


class Feed(Protocol):
    """What runs train and evaluate on: global batches by step, and held-out sequences by place or number.

    Batches have `num_tokens` and `to(device)`, and `text_bytes` where their targets stand for bytes of text.
    """

    def train(self, step: int, size: int, start: int = 0, stop: int | None = None) -> Any:
        """Sequences start..stop of the global batch of `size` sequences of this step, whoever asks for which part."""
        ...

    def valid_windows(self, limit: int) -> np.ndarray:
        """[n] int64: at most `limit` held-out sequences, always the same ones."""
        ...

    def valid(self, starts: np.ndarray, first: int = 0) -> Any:
        """Some of them as a batch; the first of them is number `first`."""
        ...


class Batches:
    """Global batches of a corpus, and any slice of them. Raises `UserError` when the text is too short for a window."""

    def __init__(self, corpus: Corpus, seq_len: int, seed: int) -> None:
        self.corpus, self.seq_len, self.seed = corpus, seq_len, seed
        for split, tokens in (("training", corpus.train), ("validation", corpus.valid)):
            if len(tokens) < seq_len + 1:
                raise UserError(
                    f"the {split} text has only {len(tokens)} tokens and a window needs {seq_len + 1}: "
                    "give more text, or a smaller seq_len"
                )
        # One window less than would fit, so that its start can be shifted; a text of a single window is not shifted.
        self.windows = max(1, (len(corpus.train) - seq_len) // seq_len)
        self._shift = len(corpus.train) >= 2 * seq_len

    def starts(self, step: int, size: int) -> np.ndarray:
        """[size] int64: where the windows of the global batch of this step begin in the training text."""
        place = np.arange(size, dtype=np.int64) + step * size
        epoch, number = np.divmod(place, self.windows)
        out = np.empty(size, dtype=np.int64)
        for e in np.unique(epoch):
            here = epoch == e
            key = int(_hash(np.asarray([self.seed & 0xFFFFFFFFFFFFFFFF, e], dtype=np.uint64))[-1])
            phase = key % self.seq_len if self._shift else 0
            out[here] = permute(number[here], self.windows, key) * self.seq_len + phase
        return out

    def train(self, step: int, size: int, start: int = 0, stop: int | None = None) -> Batch:
        """Sequences start..stop of the global batch of `size` sequences of this step."""
        rows = slice(start, size if stop is None else stop)
        batch = self._gather(self.corpus.train, self.starts(step, size)[rows], rows.start)
        return dataclasses.replace(batch, text_bytes=batch.targets.numel() * self.corpus.bytes_per_token)

    def valid_windows(self, limit: int) -> np.ndarray:
        """[n] int64: where the validation windows begin: at most `limit`, evenly spaced, never overlapping."""
        room = len(self.corpus.valid) - 1 - self.seq_len
        n = min(limit, room // self.seq_len + 1)
        return np.arange(n, dtype=np.int64) * room // max(1, n - 1)

    def valid(self, starts: np.ndarray, first: int = 0) -> Batch:
        """Validation windows that begin at `starts`; the first of them is number `first`."""
        batch = self._gather(self.corpus.valid, starts, first)
        if self.corpus.valid_lengths is None:
            return dataclasses.replace(batch, text_bytes=float(batch.targets.numel()))
        places = starts[:, None] + np.arange(1, self.seq_len + 1)
        return dataclasses.replace(batch, text_bytes=float(self.corpus.valid_lengths[places].sum(dtype=np.int64)))

    def _gather(self, text: np.ndarray, starts: np.ndarray, first: int) -> Batch:
        S = self.seq_len
        window = torch.from_numpy(text[starts[:, None] + np.arange(S + 1)].astype(np.int64))
        return Batch(
            tokens=window[:, :-1].contiguous(),
            targets=window[:, 1:].contiguous(),
            unit_id=torch.arange(first * S, (first + len(starts)) * S),
            text_bytes=0.0,
        )


def permute(numbers: np.ndarray, size: int, key: int) -> np.ndarray:
    """[n] int64: where a keyed bijection of 0..size-1 sends `numbers` [n].

    A four-round Feistel network on the next even number of bits; values that fall outside walk on until they are in.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = _hash(np.arange(key & 0xFFFF, (key & 0xFFFF) + 4, dtype=np.uint64) + np.uint64(key & 0x7FFFFFFFFFFF0000))

    def once(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        return (left << np.uint64(half)) | right

    out = once(numbers.astype(np.uint64))
    while (outside := out >= size).any():
        out[outside] = once(out[outside])
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijective mix of 64-bit words (multiply and shift), wrapping around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(words: np.ndarray) -> np.ndarray:
    """[n] uint64: a running hash over words, wrapping around."""
    out, state = np.empty_like(words), np.full(1, 0x9E3779B97F4A7C15, dtype=np.uint64)
    for i, word in enumerate(words):
        state = _mix(state ^ _mix(np.full(1, word, dtype=np.uint64) + np.uint64(i + 1)))
        out[i] = state[0]
    return out
