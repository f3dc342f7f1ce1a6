"""Labels of held-out tokens, for traces: the kind of character, and for Python text the kind of token."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..trace.labels import CHARACTERS, PYTHON, character_labels, labels_of_tokens, python_labels
from .corpus import Corpus
from .tokenizer import Tokenizer

__all__ = ["Labels"]

_BEFORE = 1 << 16  # tokens read before a window, so that a string or comment that began earlier is recognised


class Labels:
    """Labels of windows of the validation text. Results are kept: the same windows are asked for again and again."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seq_len: int) -> None:
        self.corpus, self.tokenizer, self.seq_len = corpus, tokenizer, seq_len
        files = [f["name"] for f in corpus.record["files"]]
        self.python = sum(name.endswith((".py", ".pyi")) for name in files) > len(files) / 2
        self._known: dict[bytes, dict[str, np.ndarray]] = {}

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        """kind -> names of its labels."""
        return {"character": CHARACTERS} | ({"python": PYTHON} if self.python else {})

    def __call__(self, starts: np.ndarray) -> dict[str, np.ndarray]:
        """label.<kind> -> [B*S] label of every input token of the windows that begin at `starts`; -1 = none."""
        key = starts.tobytes()
        if key not in self._known:
            parts = [self._window(int(start)) for start in starts]
            self._known[key] = {f"label.{n}": np.concatenate([p[n] for p in parts]) for n in self.names}
        return self._known[key]

    def _window(self, start: int) -> dict[str, np.ndarray]:
        stop = start + self.seq_len
        begin = max(0, start - _BEFORE)
        before = np.asarray(self.corpus.valid[begin:start])
        ends = np.flatnonzero(before == self.tokenizer.separator)
        begin += int(ends[-1]) + 1 if len(ends) else 0
        ids = np.asarray(self.corpus.valid[begin:stop])
        lengths = self.corpus.valid_lengths
        counts = np.ones(len(ids), np.int64) if lengths is None else np.asarray(lengths[begin:stop], np.int64)
        if lengths is None:
            text = ids.astype(np.uint8).tobytes()
        else:
            text = self.tokenizer.decode(ids[counts > 0].tolist()).encode()
        if len(text) != counts.sum():  # a tokenizer that does not give back its text
            return {name: np.full(self.seq_len, -1, np.int16) for name in self.names}
        made = {"character": character_labels(text)} | ({"python": python_labels(text)} if self.python else {})
        return {name: labels_of_tokens(labels, counts)[start - begin :] for name, labels in made.items()}
