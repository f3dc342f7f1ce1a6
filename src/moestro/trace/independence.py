"""Whether labels (domains, tasks) go to different experts: counts by label, and the chi-square test on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import UserError
from ..core.plan import AnyPlan
from ..core.trail import Trail
from .metrics import label_counts
from .record import table_of
from .tables import Array

__all__ = ["Independence", "independence", "upper_gamma", "usage_by_label"]


class Independence(NamedTuple):
    """Pearson's test of a table of counts [M, E].

    chi_square: sum over cells of (count - expected)^2 / expected, expected = row * column / total. degrees:
    (rows - 1) * (columns - 1), of those with any count. p: chance of so large a value where label and expert are
    independent.
    cramers_v: sqrt(chi_square / (total * min(rows - 1, columns - 1))), 0 = independent, 1 = one decides the other.
    """

    chi_square: float
    degrees: int
    p: float
    cramers_v: float


def usage_by_label(trail: Trail, labels: Any, num_labels: int, pass_: int = 0) -> dict[str, Array]:
    """path -> [M, E] int64: choices of each expert by the units of each label, before capacity.

    labels: [T] integers of the units, -1 = none; of a batch with domains `batch.domain[:, None].expand(B, S)`, flat.
    """
    plans: Mapping[str, AnyPlan] = {key.path: p for key, p in trail.plans().items() if key.pass_ == pass_}
    given = np.asarray(labels).reshape(-1)
    return {p: label_counts(table_of(plan, 0), given, num_labels, plan.num_experts) for p, plan in plans.items()}


def independence(counts: Any) -> Independence:
    """The test on counts [M, E] (labels by experts). Raises `UserError` for a table of fewer than two rows or columns
    that hold anything.

    Counts should be of units that are drawn independently. Tokens of one text are not: their chi-square is too large by
    about as much as they resemble each other, and Cramer's V, which does not grow with their number, says more.
    """
    table = np.asarray(counts, np.float64)
    if table.ndim != 2 or (table < 0).any():
        raise UserError(f"independence: needs counts [labels, experts], found a table of shape {list(table.shape)}")
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    rows, columns = table.shape
    if min(rows, columns) < 2:
        raise UserError(f"independence: needs two labels and two experts with counts, found {rows} and {columns}")
    total = table.sum()
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / total
    value = float(((table - expected) ** 2 / expected).sum())
    degrees = (rows - 1) * (columns - 1)
    share = math.sqrt(value / (total * min(rows - 1, columns - 1)))
    return Independence(value, degrees, upper_gamma(degrees / 2, value / 2), share)


def upper_gamma(a: float, x: float) -> float:
    """Q(a, x), the regularised upper incomplete gamma function; Q(n/2, x/2): tail of chi-square, n degrees.

    By its series below a + 1, by its continued fraction above.
    """
    if x <= 0:
        return 1.0
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        step = a
        while term > total * 1e-17:
            step += 1
            term *= x / step
            total += term
        return 1.0 - front * total
    b, c, d = x + 1 - a, math.inf, 1 / (x + 1 - a)
    fraction, i = d, 0
    while True:
        i += 1
        numerator = -i * (i - a)
        b += 2
        d = 1 / (numerator * d + b)
        c = b + numerator / c
        fraction *= c * d
        if abs(c * d - 1) < 1e-15 or i > 10_000:
            return front * fraction
