"""Vocabularies of examples in files, and as tokenizers of running text for whatever reads a run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..core.errors import UserError
from .data.bpe import PairTexts
from .data.config import ByteVocabulary
from .data.vocabulary import SPECIAL, ByteTexts, TextVocabulary, WordTexts
from .tokenizer import Encoded

__all__ = ["VocabularyTokenizer", "read_vocabulary"]


def read_vocabulary(path: Path) -> TextVocabulary:
    """The vocabulary in a run's `tokenizer.json`. Raises `UserError` for a file that holds none."""
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        kind = data.get("moestro")
        if kind == "bytes of examples":
            return ByteTexts(ByteVocabulary(), more=data["specials"][len(SPECIAL) :])
        if kind == "words of examples":
            return WordTexts.of(data["words"], data["lower"], data["specials"])
        return PairTexts.of(text)
    except OSError as error:
        raise UserError(f"{path}: the vocabulary cannot be read ({error.strerror}); check the path") from None
    except UserError:
        raise
    except Exception:  # the package tokenizers raises nothing narrower
        raise UserError(f"{path}: holds no vocabulary of examples; restore the file from a copy") from None


class VocabularyTokenizer:
    """A vocabulary as a tokenizer: texts are separated by its eos. What is said of lengths holds up to white space."""

    def __init__(self, vocabulary: TextVocabulary) -> None:
        self.vocabulary = vocabulary
        self.vocab_size, self.separator, self.key = vocabulary.size, vocabulary.eos, vocabulary.key

    def encode(self, text: bytes) -> Encoded:
        """Tokens stand for the bytes from the end of the token before to their own end; the last one for the rest."""
        chars = text.decode("utf-8", "replace")
        ids, places = self.vocabulary.placed(chars)
        if not ids:
            return Encoded(np.empty(0, np.int64), np.empty(0, np.int64))
        at = np.concatenate([[0], np.cumsum([len(char.encode("utf-8", "replace")) for char in chars])])
        ends = np.maximum.accumulate(np.asarray([end for _, end in places], dtype=np.int64))
        ends[-1] = len(chars)
        return Encoded(np.asarray(ids, dtype=np.int64), np.diff(at[ends], prepend=0))

    def decode(self, ids: Sequence[int]) -> str:
        return self.vocabulary.decode(ids)

    def piece(self, i: int) -> str:
        """One token for people: special tokens by name."""
        v = self.vocabulary
        first = v.pad
        return v.specials[i - first] if first <= i < first + len(v.specials) else v.decode([i])

    def to_json(self) -> str:
        return self.vocabulary.to_json()
