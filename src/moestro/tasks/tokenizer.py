"""Tokenizers: text to ids and back. Bytes here; those read from files in `tokenizer_file`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

__all__ = ["Bytes", "Encoded", "Tokenizer"]


class Encoded(NamedTuple):
    """ids: [n] int64. lengths: [n] int64, bytes of text that each token stands for; they add up to the text's bytes."""

    ids: np.ndarray
    lengths: np.ndarray


class Tokenizer(Protocol):
    """vocab_size: number of ids. separator: the id between two files. key: SHA-256 of what defines it."""

    vocab_size: int
    separator: int
    key: str

    def encode(self, text: bytes) -> Encoded: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def to_json(self) -> str:
        """The content of the run's `tokenizer.json`, from which `read_tokenizer` makes it again."""
        ...


class Bytes:
    """256 ids, one per byte. Files are separated by the byte 0, which no text contains and which counts as text."""

    vocab_size = 256
    separator = 0
    key = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: bytes) -> Encoded:
        ids = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        return Encoded(ids, np.ones_like(ids))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")

    def to_json(self) -> str:
        return json.dumps({"moestro": "bytes", "vocab_size": 256, "separator": 0}) + "\n"
