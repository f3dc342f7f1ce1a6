"""Units through experts and back, as separate steps: what every `mixture` equals."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ...core.plan import AnyPlan, Dense, ExpertChoice
from ...core.protocols import Experts
from ...core.rows import Rows
from ..rows import rows
from .functions import combine, gather_rows, table_weight

__all__ = ["through"]


def through(
    experts: Experts, units: Tensor, plan: AnyPlan, context: Any = None, weights: dict[str, Tensor] | None = None
) -> Tensor:
    """y of units under a plan: their rows, through `experts(rows, index, ...)`, combined by the plan's weights.

    Shapes: units [T, *unit] -> [T, *unit'].
    """
    index = _bounded(rows(plan), plan)
    out = experts(gather_rows(units, index), index, context, weights)
    return combine(out, table_weight(plan, index), index)


def _bounded(index: Rows, plan: AnyPlan) -> Rows:
    """The index with the capacity that the type of the plan implies: experts that choose, experts that take all."""
    if isinstance(plan, ExpertChoice):
        return dataclasses.replace(index, capacity=plan.unit.shape[0] * plan.unit.shape[2])
    return dataclasses.replace(index, capacity=index.num_units) if isinstance(plan, Dense) else index
