"""Exact match and F1 of SQuAD, and the choice of the best span (Robust QA, arXiv 2204.09598, Decoding)."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...core.errors import UserError

if TYPE_CHECKING:
    from ..data.examples import SpanQuestion
    from ..data.windows import Window

__all__ = ["SpanScores", "best_spans", "exact_match", "normalised", "span_scores", "token_f1"]

_MARKS = str.maketrans("", "", string.punctuation)


class SpanScores(NamedTuple):
    """Means over questions, 0 to 100."""

    exact_match: float
    f1: float


def normalised(text: str) -> str:
    """Lower case, without punctuation, without a, an, the, blanks made single."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_MARKS)).split())


def exact_match(said: str, wanted: str) -> float:
    """1 where both are equal once normalised."""
    return float(normalised(said) == normalised(wanted))


def token_f1(said: str, wanted: str) -> float:
    """F1 of the words of both, normalised, as often as they occur; where one has none, 1 if the other has none too."""
    a, b = normalised(said).split(), normalised(wanted).split()
    if not a or not b:
        return float(a == b)
    same = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * same / (len(a) + len(b))


def span_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> SpanScores:
    """Exact match and F1, each the best over the answers of a question; no answers: the empty text is right."""
    if len(predictions) != len(answers) or not predictions:
        raise UserError(f"{len(predictions)} predictions for {len(answers)} questions; need as many, at least one")
    exact = [max(exact_match(said, a) for a in wanted or ("",)) for said, wanted in zip(predictions, answers)]
    f1 = [max(token_f1(said, a) for a in wanted or ("",)) for said, wanted in zip(predictions, answers)]
    return SpanScores(100 * sum(exact) / len(exact), 100 * sum(f1) / len(f1))


def best_spans(
    questions: Sequence[SpanQuestion],
    windows: Sequence[Window],
    start: Sequence[np.ndarray],
    end: Sequence[np.ndarray],
    candidates: int = 20,
    longest: int = 30,
    as_released: bool = False,
) -> list[str]:
    """The text that scores best for every question, over all of its windows.

    start, end: per window the logits of its tokens, [S] or longer (padding is not looked at). Of the `candidates` best
    starts and ends in the context those with start <= end and at most `longest` tokens compete; the score is the sum of
    both logits. A question without windows gets "". as_released: end > start, so that no answer is a single token.
    """
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
    for window, s, e in zip(windows, start, end, strict=True):
        places = np.asarray(window.places)
        inside = np.flatnonzero(places[:, 1] > places[:, 0])
        s, e = np.asarray(s, dtype=np.float64), np.asarray(e, dtype=np.float64)
        first, last = (inside[np.argsort(-x[inside], kind="stable")[:candidates]] for x in (s, e))
        length = last[None, :] - first[:, None] + 1
        allowed = (length > int(as_released)) & (length <= longest)
        if not allowed.any():
            continue
        score = np.where(allowed, s[first][:, None] + e[last][None, :], -np.inf)
        i, j = np.unravel_index(int(score.argmax()), score.shape)
        if score[i, j] > best[window.example][0]:
            low, high = places[first[i]][0], places[last[j]][1]
            best[window.example] = float(score[i, j]), questions[window.example].context[low:high]
    return [text for _, text in best]
