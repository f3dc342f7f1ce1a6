"""How well a similarity tells related pairs from others (Contrastive MoE embeddings, arXiv 2401.15713, Evaluation)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...core.errors import UserError

__all__ = ["BestF1", "Similarities", "best_f1", "similarities"]


class BestF1(NamedTuple):
    """The best F1 over thresholds, and there: precision, recall, and the threshold (related: score >= it)."""

    f1: float
    precision: float
    recall: float
    threshold: float


class Similarities(NamedTuple):
    """Mean similarity of related and of other pairs, and their quotient (nan where the others' is 0)."""

    related: float
    others: float
    ratio: float


def best_f1(scores: ArrayLike, related: ArrayLike) -> BestF1:
    """F1max: the best F1 that "score >= threshold" reaches, over all thresholds; pairs of one score go together.

    Shapes: scores [N]; related [N] bool, at least one True. Of equal F1 the highest threshold is given.
    """
    s, y = _checked(scores, related)
    if not y.any():
        raise UserError("F1max needs at least one related pair")
    order = np.argsort(-s, kind="stable")
    s, hits = s[order], np.cumsum(y[order])
    last = np.flatnonzero(np.append(s[1:] != s[:-1], True))
    taken = last + 1
    f1 = 2 * hits[last] / (taken + y.sum())
    best = int(f1.argmax())
    return BestF1(
        float(f1[best]),
        float(hits[last[best]] / taken[best]),
        float(hits[last[best]] / y.sum()),
        float(s[last[best]]),
    )


def similarities(scores: ArrayLike, related: ArrayLike) -> Similarities:
    """Mean similarity of both kinds of pairs, at least one of each. Shapes as in `best_f1`."""
    s, y = _checked(scores, related)
    if y.all() or not y.any():
        raise UserError("mean similarities need pairs of both kinds")
    a, b = float(s[y].mean()), float(s[~y].mean())
    return Similarities(a, b, a / b if b else float("nan"))


def _checked(scores: ArrayLike, related: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(related, dtype=bool)
    if s.shape != y.shape or s.ndim != 1 or not s.size:
        raise UserError(f"scores {s.shape} and related {y.shape} must be [N] both, with N >= 1")
    if not np.isfinite(s).all():
        raise UserError("scores must be finite; is an embedding nan?")
    return s, y
