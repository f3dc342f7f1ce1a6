"""Where synonyms come from: a table that the user gives, or words that stand among like neighbours in a text.

A table is a mapping, lower-case word -> words of like meaning: what `augment.augmented` takes.
"""

from __future__ import annotations

import collections
import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ...core.errors import UserError
from .augment import STOP_WORDS, Eda, augmented
from .examples import SpanQuestion

__all__ = ["neighbours", "read_synonyms", "with_copies"]

_CONTEXTS = 1000  # the most frequent words count as neighbours


def read_synonyms(path: str | Path) -> dict[str, tuple[str, ...]]:
    """A table from a file: a JSON object {word: [words]}, or lines `word<TAB>synonym, synonym`.

    Words are taken in lower case, and a word is no synonym of itself. Blank lines and lines that begin with # are
    skipped. Raises `UserError` for a missing file and for lines of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; a table of synonyms is JSON {{word: [words]}} or lines word<TAB>a, b")
    text = path.read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: holds no JSON ({error})") from None
        if not isinstance(rows, dict) or not all(
            isinstance(said, list) and all(isinstance(s, str) for s in said) for said in rows.values()
        ):
            raise UserError(f"{path}: should be one JSON object, word -> list of words")
        for word, said in rows.items():
            found.setdefault(word.strip().lower(), []).extend(said)
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            word, tab, said = line.partition("\t")
            if not tab or not word.strip():
                raise UserError(f"{path}, line {number}: should be a word, a tab, and synonyms with commas between")
            found.setdefault(word.strip().lower(), []).extend(said.split(","))
    table = {word: tuple(dict.fromkeys(s.strip().lower() for s in said if s.strip())) for word, said in found.items()}
    return {word: kept for word, said in table.items() if (kept := tuple(s for s in said if s != word))}


def neighbours(
    texts: Iterable[str],
    *,
    words: int = 4000,
    least_count: int = 10,
    window: int = 3,
    dim: int = 100,
    most: int = 5,
    least_similarity: float = 0.5,
) -> dict[str, tuple[str, ...]]:
    """Words -> those nearest to them by the company they keep in `texts`, nearest first: a table without a dictionary.

    Of the `words` most frequent words of letters that occur `least_count` times or more and are no stop words: positive
    pointwise mutual information with the words at most `window` places away (contexts smoothed by the power 0.75, Levy
    et al. 2015), its `dim` largest singular directions times the roots of their values, cosines; the `most` nearest of
    at least `least_similarity`. Such neighbours are of one kind (days, colours, verbs of one tense) rather than of one
    meaning, and opposites are among them. Raises `UserError` where no two words are frequent enough.
    """
    split = [re.findall(r"\w+", text.lower()) for text in texts]
    counts = collections.Counter(word for text in split for word in text)
    ranked = sorted(counts, key=lambda w: (-counts[w], w))
    taken = [w for w in ranked if w.isalpha() and w not in STOP_WORDS and counts[w] >= least_count][:words]
    if len(taken) < 2:
        raise UserError(
            f"neighbours: {len(taken)} words occur {least_count} times or more; give more text, or lower least_count"
        )
    contexts = ranked[:_CONTEXTS]
    table = _information(split, taken, contexts, window)
    vectors = _directions(table, dim)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    near = vectors @ vectors.T
    np.fill_diagonal(near, -1.0)
    out: dict[str, tuple[str, ...]] = {}
    for i, word in enumerate(taken):
        best = np.argsort(-near[i], kind="stable")[:most]
        said = tuple(taken[j] for j in best if near[i, j] >= least_similarity)
        if said:
            out[word] = said
    return out


def with_copies(questions: Sequence[SpanQuestion], eda: Eda, synonyms: str | Path = "") -> tuple[SpanQuestion, ...]:
    """Questions with their changed copies behind them. synonyms: a file for `read_synonyms`; "" = `neighbours` in the
    texts of these questions, and none where too few words are frequent."""
    table: dict[str, tuple[str, ...]] = {}
    if synonyms:
        table = read_synonyms(synonyms)
    else:
        with contextlib.suppress(UserError):
            table = neighbours(dict.fromkeys(text for q in questions for text in (q.context, q.question)))
    return (*questions, *(copy for q in questions for copy in augmented(q, eda, table)))


def _directions(table: np.ndarray, dim: int) -> np.ndarray:
    """[words, dim]: U sqrt(S) of the largest singular values, by subspace iteration (Halko et al. 2011)."""
    wide = min(dim + 10, *table.shape)
    basis = np.random.default_rng(0).standard_normal((table.shape[1], wide))
    for _ in range(5):
        basis = np.linalg.qr(table.T @ (table @ basis))[0]
    left, strength, _ = np.linalg.svd(table @ basis, full_matrices=False)
    return left[:, :dim] * np.sqrt(strength[:dim])


def _information(split: list[list[str]], taken: list[str], contexts: list[str], window: int) -> np.ndarray:
    """[words, contexts] positive pointwise mutual information, nats."""
    row, column = ({w: i for i, w in enumerate(ws)} for ws in (taken, contexts))
    gap = [None] * window  # texts do not see each other
    flat = [w for text in split for w in (*text, *gap)]
    rows = np.array([row.get(w, -1) for w in flat])  # type: ignore[arg-type]
    columns = np.array([column.get(w, -1) for w in flat])  # type: ignore[arg-type]
    pairs = np.zeros(len(taken) * len(contexts))
    for away in range(1, window + 1):
        for a, b in ((rows[away:], columns[:-away]), (rows[:-away], columns[away:])):
            both = (a >= 0) & (b >= 0)
            pairs += np.bincount(a[both] * len(contexts) + b[both], minlength=len(pairs))
    table = pairs.reshape(len(taken), len(contexts))
    smooth = table.sum(0) ** 0.75
    expected = table.sum(1, keepdims=True) * (smooth / max(smooth.sum(), 1e-12))
    ratio = np.divide(table, expected, out=np.zeros_like(table), where=expected > 0)
    return np.log(np.maximum(ratio, 1.0))
