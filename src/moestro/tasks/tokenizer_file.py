"""Tokenizers from files: ours for bytes, or Hugging Face's `tokenizers`, which only this file needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..core.errors import UserError
from .tokenizer import Bytes, Encoded, Tokenizer

__all__ = ["FileTokenizer", "read_tokenizer"]

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]", "<|im_end|>")


class FileTokenizer:
    """A tokenizer of the package `tokenizers`, without truncation, padding or added special tokens.

    Files are separated by its end-of-text token, or by its first token of a line break where it has none. Bytes that
    are no UTF-8 become U+FFFD first; lengths count the bytes of the text after that.
    """

    def __init__(self, text: str, name: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"{name}: tokenizer files need the package tokenizers; pip install 'moestro[tokenizers]', "
                "or leave the tokenizer out to train on bytes"
            ) from None
        try:
            self._inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise UserError(f"{name}: no tokenizer of Hugging Face's tokenizers ({error})") from None
        self._inner.no_truncation()
        self._inner.no_padding()
        self._text = text
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.vocab_size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab_size < 2:
            raise UserError(f"{name}: the tokenizer has no vocabulary")
        self.separator = self._separator(name)

    def _separator(self, name: str) -> int:
        for end in _ENDS:
            found = self._inner.token_to_id(end)
            if found is not None:
                return found
        ids = self._inner.encode("\n", add_special_tokens=False).ids or self._inner.encode(" ").ids
        if not ids:
            raise UserError(f"{name}: neither an end-of-text token nor a line break to put between files")
        return ids[0]

    def encode(self, text: bytes) -> Encoded:
        chars = text.decode("utf-8", "replace")
        made = self._inner.encode(chars, add_special_tokens=False)
        ids = np.asarray(made.ids, dtype=np.int64)
        if not len(ids):
            return Encoded(ids, ids.copy())
        points = np.frombuffer(chars.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        width = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
        at = np.concatenate([[0], np.cumsum(width)])  # bytes before each character
        ends = np.maximum.accumulate(np.asarray([end for _, end in made.offsets], dtype=np.int64))
        ends[-1] = len(points)
        return Encoded(ids, np.diff(at[ends], prepend=0))

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        return self._text


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a JSON file (ours for bytes, or one of Hugging Face's tokenizers); "" = bytes."""
    if not str(path):
        return Bytes()
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        raise UserError(f"{path}: the tokenizer cannot be read ({error.strerror}); check the path") from None
    except ValueError:
        raise UserError(f"{path}: no JSON; a tokenizer is a tokenizer.json of Hugging Face's tokenizers") from None
    if isinstance(data, dict) and data.get("moestro") == "bytes":
        return Bytes()
    return FileTokenizer(text, str(path))
