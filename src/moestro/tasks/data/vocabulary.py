"""Vocabularies: text to ids with the place of every token in the text. Bytes and words here, byte pairs in `bpe`."""

from __future__ import annotations

import collections
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

from ...core.errors import UserError
from .config import ByteVocabulary, WordVocabulary

__all__ = ["SPECIAL", "ByteTexts", "Placed", "TextVocabulary", "WordTexts", "split_words"]

SPECIAL = ("<pad>", "<bos>", "<eos>", "<sep>", "<cls>", "<unk>")


class Placed(NamedTuple):
    """ids: of the tokens. places: for each the characters it stands for, (start, end); without white space in front."""

    ids: list[int]
    places: list[tuple[int, int]]


class TextVocabulary:
    """Base: ids of special tokens (attributes pad, bos, eos, sep, cls, unk; others by `special`), size and key.

    size: number of ids. key: SHA-256 of what defines it.
    """

    def __init__(self, names: Sequence[str], first: int, size: int, said: object) -> None:
        self.specials = names = tuple(names)
        if len(set(names)) < len(names):
            raise UserError(f"special tokens must differ, found {', '.join(names)}")
        self._special = {name: first + i for i, name in enumerate(names)}
        self.pad, self.bos, self.eos, self.sep, self.cls, self.unk = (self._special[n] for n in SPECIAL)
        self.size = size
        self.key = hashlib.sha256(json.dumps([type(self).__name__, names, said]).encode()).hexdigest()

    def special(self, name: str) -> int:
        """The id of a special token. Raises `UserError` for an unknown one."""
        if name not in self._special:
            raise UserError(f"no special token {name!r}; there are {', '.join(self._special)}")
        return self._special[name]

    def placed(self, text: str) -> Placed:
        """The tokens of a text and where they stand in it. No special tokens are added, or found in it."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.placed(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and ids beyond the vocabulary are left out."""
        raise NotImplementedError

    def to_json(self) -> str:
        """What `tasks.vocabulary_file.read_vocabulary` makes the vocabulary from again."""
        raise NotImplementedError

    def _json(self, kind: str, **values: Any) -> str:
        return json.dumps({"moestro": kind, "specials": self.specials, **values}, ensure_ascii=False) + "\n"


class ByteTexts(TextVocabulary):
    """Ids 0 to 255 are bytes of UTF-8, special tokens follow. Every byte of a character has the character's place."""

    def __init__(self, config: ByteVocabulary, texts: Iterable[str] = (), more: Sequence[str] = ()) -> None:
        names = (*SPECIAL, *more)
        super().__init__(names, 256, 256 + len(names), None)

    def placed(self, text: str) -> Placed:
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        for i, char in enumerate(text):
            found = char.encode("utf-8", "replace")
            ids += found
            places += [(i, i + 1)] * len(found)
        return Placed(ids, places)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")

    def to_json(self) -> str:
        return self._json("bytes of examples")


class WordTexts(TextVocabulary):
    """Special tokens first, then the most frequent words of `texts` (ties: in alphabetical order), blanks between."""

    def __init__(self, config: WordVocabulary, texts: Iterable[str], more: Sequence[str] = ()) -> None:
        names = (*SPECIAL, *more)
        self.lower = config.lower
        counts: collections.Counter[str] = collections.Counter()
        for text in texts:
            counts.update(self._said(text, place) for place in split_words(text))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        self._set(names, ranked[: max(0, config.size - len(names))])

    def _set(self, names: Sequence[str], words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._number = {word: len(names) + i for i, word in enumerate(self.words)}
        super().__init__(names, 0, len(names) + len(self.words), [self.words, self.lower])

    @classmethod
    def of(cls, words: Sequence[str], lower: bool, names: Sequence[str]) -> Self:
        """The vocabulary of these words, in this order. names: of all special tokens."""
        made = cls.__new__(cls)
        made.lower = lower
        made._set(names, words)
        return made

    def to_json(self) -> str:
        return self._json("words of examples", words=self.words, lower=self.lower)

    def placed(self, text: str) -> Placed:
        places = split_words(text)
        return Placed([self._number.get(self._said(text, place), self.unk) for place in places], places)

    def decode(self, ids: Iterable[int]) -> str:
        first = len(self.specials)
        return " ".join(self.words[i - first] for i in ids if first <= i < self.size)

    def _said(self, text: str, place: tuple[int, int]) -> str:
        word = text[slice(*place)]
        return word.lower() if self.lower else word


def split_words(text: str) -> list[tuple[int, int]]:
    """Where words and single punctuation marks stand, (start, end)."""
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]
