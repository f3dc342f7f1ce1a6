"""Units to rows and back, with backwards that add in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.plan import AnyPlan, ExpertChoice
from ...core.rows import Rows
from .sums import row_dots, scaled_rows, sum_rows

__all__ = ["combine", "gather_rows", "table_weight"]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape = x.shape
        return x.reshape(x.shape[0], x.shape[1:].numel()).index_select(0, unit).view(unit.shape[0], *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0]
        flat = grad.reshape(grad.shape[0], grad.shape[1:].numel()).contiguous()  # it may be expanded
        return sum_rows(flat, None, inverse).view(ctx.shape), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, weight: Tensor, unit: Tensor, slot: Tensor, inverse: Tensor) -> Tensor:
        flat = out.reshape(out.shape[0], out.shape[1:].numel()).contiguous()
        ctx.save_for_backward(flat, weight, unit, slot, inverse)
        ctx.shape = out.shape
        return sum_rows(flat, weight, inverse).view(inverse.shape[0], *out.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, unit, slot, inverse = ctx.saved_tensors
        grad = grads[0]
        grad = grad.reshape(grad.shape[0], grad.shape[1:].numel()).contiguous()
        place = unit * inverse.shape[1] + slot
        d_out = d_weight = None
        if ctx.needs_input_grad[0]:
            row_weight = weight.reshape(-1).index_select(0, place)
            d_out = scaled_rows(grad, unit, row_weight, flat.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dots = row_dots(flat, grad, unit).to(weight.dtype)
            d_weight = weight.new_zeros(weight.numel()).scatter_(0, place, dots).view(weight.shape)
        return d_out, d_weight, None, None, None


class _Table(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, unit: Tensor, slot: Tensor, source: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(unit, slot, source)
        ctx.shape = weight.shape
        table = weight.new_zeros(inverse.shape)
        table[unit, slot] = weight.reshape(-1).index_select(0, source)
        return table

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unit, slot, source = ctx.saved_tensors
        d_weight = grads[0].new_zeros(ctx.shape.numel())
        d_weight[source] = grads[0][unit, slot]
        return d_weight.view(ctx.shape), None, None, None, None


def gather_rows(x: Tensor, index: Rows) -> Tensor:
    """The unit of every row: [T, *u] -> [R, *u]. The gradient of a unit is the sum of its rows', k = 0..K-1."""
    return _Gather.apply(x, index.unit, index.inverse)  # type: ignore[return-value]


def combine(out: Tensor, weight: Tensor, index: Rows) -> Tensor:
    """The weighted sum of every unit's rows: y[t] = sum over k of weight[t, k] * out[inverse[t, k]].

    Shapes: out [R, *u], weight [T, K] (see `table_weight`) -> [T, *u] in the dtype of `out`. Terms are added in the
    order k = 0..K-1, in fp32 (float64 for float64). Choices without a row add nothing, whatever their weight.
    """
    return _Combine.apply(out, weight, index.unit, index.slot, index.inverse)  # type: ignore[return-value]


def table_weight(plan: AnyPlan, index: Rows) -> Tensor:
    """[T, K]: the plan's weights at the places of `index.inverse`: the plan's own table, gathered for ExpertChoice."""
    if isinstance(plan, ExpertChoice):
        table = _Table.apply(plan.weight, index.unit, index.slot, index.source, index.inverse)
        return table  # type: ignore[return-value]
    return plan.weight
