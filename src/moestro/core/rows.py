"""Rows: the (unit, slot, expert) triples of a plan, sorted by expert, then unit; derived by `ops.rows`."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .pytree import pytree, static

__all__ = ["Rows"]


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """An index of rows, a value and no part of the plan.

    Shapes (all int64):
        unit: [R] which unit a row belongs to. slot: [R] the column of `inverse` that holds it.
        expert: [R] ascending. offsets: [E+1] rows of expert e are offsets[e]..offsets[e+1].
        inverse: [T, K] row number of each choice, -1 = no row.
        source: [R] position of the row's weight in the flattened weight table of the plan.
        weight: [R] fp32 or None; for experts that scale inside (weight within the activation, partial sums).

    Static: num_experts E, num_units T, capacity or None.
    """

    unit: Tensor
    slot: Tensor
    expert: Tensor
    offsets: Tensor
    inverse: Tensor
    source: Tensor
    weight: Tensor | None = None
    num_experts: int = static()
    num_units: int = static()
    capacity: int | None = static(default=None)
