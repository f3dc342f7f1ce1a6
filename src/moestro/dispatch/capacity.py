"""The capacity exchange: rows are laid out as a padded table of a fixed size."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..core.carry import Forecast
from ..core.errors import UserError
from ..core.plan import AnyPlan
from ..core.rows import Rows
from .config import Capacity

__all__ = ["CapacityExchange"]


class _Lay(torch.autograd.Function):
    """rows [R, *u] -> table [n, *u] with row r at place[r] and zeros elsewhere. Places are distinct."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(place)
        return rows.new_zeros(n, *rows.shape[1:]).index_copy_(0, place, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return grads[0].index_select(0, place), None, None


class _Pick(torch.autograd.Function):
    """table [n, *u] -> rows [R, *u], row r from place[r]. Places are distinct."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.n = table.shape[0]
        return table.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        grad = grads[0]
        return grad.new_zeros(ctx.n, *grad.shape[1:]).index_copy_(0, place, grad), None


class CapacityExchange:
    """Gives every expert exactly C rows, its own first, then zeros: shapes no longer depend on the routing.

    What is inside (a bank or another exchange) sees a table of E*C rows. Rows come back in the order they came in, so
    y equals the local exchange's for every kept choice. C is `index.capacity`, which a plan has when its router
    limits capacity; without it `UserError`.

    Shapes: rows [R, *unit] -> [R, *unit'], R <= E*C. Source: GShard (dispatch into a fixed buffer).
    """

    def __init__(self, config: Capacity, inner: Any) -> None:
        self.config = config
        self.inner = config.inner.build(inner)

    def prepare(self, plan: AnyPlan | Forecast) -> None:
        self.inner.prepare(plan)

    def __call__(
        self, rows: Tensor, index: Rows, context: Any = None, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        place, padded = padded_index(index)
        table = _Lay.apply(rows, place, padded.unit.shape[0])
        return _Pick.apply(self.inner(table, padded, context, weights), place)  # type: ignore[return-value]


def padded_index(index: Rows) -> tuple[Tensor, Rows]:
    """Where each row goes in the table ([R] int64), and the index of the table (padding has unit and slot -1)."""
    C, E = index.capacity, index.num_experts
    if C is None:
        raise UserError(
            "the capacity exchange needs a plan with a capacity: give the router a limit (Router.limit), "
            "or use the local exchange"
        )
    rank = torch.arange(index.unit.shape[0], device=index.unit.device) - index.offsets.index_select(0, index.expert)
    _check(rank, C)
    place = index.expert * C + rank

    def spread(values: Tensor, fill: float) -> Tensor:
        return values.new_full((E * C,), fill).index_copy_(0, place, values)

    table = torch.arange(E * C, device=index.unit.device)
    weight = None if index.weight is None else _Lay.apply(index.weight, place, E * C)
    return place, dataclasses.replace(
        index,
        unit=spread(index.unit, -1),
        slot=spread(index.slot, -1),
        expert=table // C,
        offsets=torch.arange(E + 1, device=index.unit.device) * C,
        inverse=_follow(index.inverse, place),
        source=spread(index.source, -1),
        weight=weight,
    )


def _follow(inverse: Tensor, place: Tensor) -> Tensor:
    """The place of each choice's row, -1 = no row."""
    padded = torch.cat([place, place.new_full((1,), -1)])  # the last place is that of -1
    return padded[inverse]


def _check(rank: Tensor, capacity: int) -> None:
    fits = (rank < capacity).all()
    if rank.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(fits):
            raise UserError(f"an expert has {int(rank.max()) + 1} rows, over the plan's capacity of {capacity}")
    else:
        torch._assert_async(fits, "an expert has more rows than the plan's capacity")
