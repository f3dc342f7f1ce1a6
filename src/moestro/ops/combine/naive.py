"""Gathering, combining and weight tables as plain loops in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.plan import AnyPlan
from ...core.rows import Rows

__all__ = ["combine", "gather_rows", "table_weight"]


def gather_rows(x: Tensor, index: Rows) -> Tensor:
    """[R, *u] float64: the unit of every row."""
    units = index.unit.tolist()
    x = x.double()
    return torch.stack([x[u] for u in units]) if units else x.new_zeros((0, *x.shape[1:]))


def combine(out: Tensor, weight: Tensor, index: Rows) -> Tensor:
    """[T, *u] float64: the weighted sum of every unit's rows, k = 0..K-1."""
    units: list[Tensor] = []
    for t, row in enumerate(index.inverse.tolist()):
        total = torch.zeros(out.shape[1:], dtype=torch.float64)
        for k, r in enumerate(row):
            if r >= 0:
                total = total + weight[t, k].double() * out[r].double()
        units.append(total)
    return torch.stack(units) if units else out.double().new_zeros((0, *out.shape[1:]))


def table_weight(plan: AnyPlan, index: Rows) -> Tensor:
    """[T, K] float64: the plan's weight of each row, at the row's place in `index.inverse`; 0 where there is no row."""
    flat = plan.weight.double().reshape(-1)
    table: list[Tensor] = []
    for row in index.inverse.tolist():
        for r in row:
            table.append(flat[int(index.source[r])] if r >= 0 else flat.new_zeros(()))
    return torch.stack(table).view(index.inverse.shape) if table else flat.new_zeros(index.inverse.shape)
