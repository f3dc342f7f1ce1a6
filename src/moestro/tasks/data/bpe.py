"""Byte pairs learnt from the training text with Hugging Face's `tokenizers`; only this file of the folder needs it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from ...core.errors import UserError
from ...core.folders import data_root
from .config import BpeVocabulary
from .vocabulary import SPECIAL, Placed, TextVocabulary

__all__ = ["PairTexts"]

SCHEMA = 1


class PairTexts(TextVocabulary):
    """Special tokens first, then the 256 bytes, then what was learnt. Any text comes back as it was.

    What is learnt is kept as `<cache>/tokenizers/<hash>.json`, the hash being that of text, size and special tokens;
    without a folder that can be written it is learnt anew each time. The file is one that other tools read as well.
    """

    def __init__(self, config: BpeVocabulary, texts: Iterable[str], more: Sequence[str] = ()) -> None:
        names = (*SPECIAL, *more)
        texts = list(texts)
        digest = hashlib.sha256(json.dumps([SCHEMA, config.size, names]).encode())
        for text in texts:
            data = text.encode("utf-8", "replace")
            digest.update(len(data).to_bytes(8, "little") + data)
        path = data_root(config.cache) / "tokenizers" / f"{digest.hexdigest()[:32]}.json"
        self._set(names, _stored(path, names) or _learn(config, texts, names, path))

    def _set(self, names: Sequence[str], inner: Any) -> None:
        self._inner = inner
        super().__init__(names, 0, inner.get_vocab_size(with_added_tokens=True), inner.to_str())

    @classmethod
    def of(cls, text: str) -> Self:
        """The vocabulary that `to_json` gave the text of. Raises `ValueError` for another text."""
        added = sorted((entry["id"], entry["content"]) for entry in json.loads(text)["added_tokens"])
        inner = _package().Tokenizer.from_str(text)
        inner.encode_special_tokens = True
        made = cls.__new__(cls)
        made._set([name for _, name in added], inner)
        return made

    def placed(self, text: str) -> Placed:
        made = self._inner.encode(text, add_special_tokens=False)
        places = []
        for start, end in made.offsets:
            while start < end and text[start].isspace():
                start += 1
            places.append((start, end))
        return Placed(list(made.ids), places)

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        first = len(self.specials)
        return self._inner.decode([i for i in ids if first <= i < self.size], skip_special_tokens=False)

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return self._inner.to_str()


def _package() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "BpeVocabulary needs the package tokenizers; pip install 'moestro[tokenizers]', or use ByteVocabulary"
        ) from None
    return tokenizers


def _stored(path: Path, names: Sequence[str]) -> Any:
    """What was learnt before; None when it is not there or not what it should be."""
    with contextlib.suppress(Exception):
        found = _package().Tokenizer.from_str(path.read_text(encoding="utf-8"))
        if [found.token_to_id(name) for name in names] == list(range(len(names))):
            found.encode_special_tokens = True
            return found
    return None


def _learn(config: BpeVocabulary, texts: list[str], names: Sequence[str], path: Path) -> Any:
    package = _package()
    made = package.Tokenizer(package.models.BPE())
    made.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=config.size,
        special_tokens=list(names),
        initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer=trainer)
    # Otherwise "<eos>" written in a text would become the special token.
    made.encode_special_tokens = True
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        number, fresh = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(made.to_str())
        os.replace(fresh, path)
    return made
