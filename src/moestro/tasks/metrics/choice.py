"""Accuracy, of everything and by group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ...core.errors import UserError

__all__ = ["accuracy", "accuracy_by"]


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Share of predictions that are right."""
    got, wanted = np.asarray(predicted), np.asarray(labels)
    if got.shape != wanted.shape or not got.size:
        raise UserError(f"accuracy: predictions {got.shape} and labels {wanted.shape}; need as many, at least one")
    return float((got == wanted).mean())


def accuracy_by(predicted: ArrayLike, labels: ArrayLike, group: ArrayLike, names: Sequence[str]) -> dict[str, float]:
    """Accuracy in each group that occurs; group: numbers in `names`."""
    got, wanted, where = np.asarray(predicted), np.asarray(labels), np.asarray(group)
    found = map(int, np.unique(where))
    return {str(names[g]): accuracy(got[where == g], wanted[where == g]) for g in found}
