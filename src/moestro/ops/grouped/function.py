"""`grouped_linear`: one matrix per group of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import UserError
from ..precision import autocast_off, operands
from .choose import choose
from .spec import Spec

__all__ = ["grouped_linear"]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        ctx.backend = choose(Spec.of(rows, weight))
        with autocast_off(rows.device):
            return ctx.backend.products(rows, weight, offsets, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, offsets = ctx.saved_tensors
        backend, grad = ctx.backend, grads[0].contiguous()  # it may be expanded
        with autocast_off(rows.device):
            d_rows = backend.transposed_products(grad, weight, offsets) if ctx.needs_input_grad[0] else None
            d_weight = backend.outer(grad, rows, offsets) if ctx.needs_input_grad[1] else None
            d_bias = backend.columns(grad, offsets) if ctx.needs_input_grad[3] else None
        return d_rows, d_weight, None, d_bias


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each row times the matrix of its group: y[r] = weight[e] @ rows[r] + bias[e] for offsets[e] <= r < offsets[e+1].

    Shapes: rows [R, I], weight [E, O, I], offsets [E+1] int64, bias [E, O] or None -> [R, O]. Groups without rows get
    gradients of exact zeros. Under autocast the operands are cast; gradients come back in the parameters' dtype.
    """
    if rows.ndim != 2 or weight.ndim != 3 or rows.shape[1] != weight.shape[2]:
        raise UserError(
            f"grouped_linear needs rows [R, I] and weight [E, O, I], not {list(rows.shape)} and {list(weight.shape)}"
        )
    if offsets.shape != (weight.shape[0] + 1,):
        raise UserError(f"grouped_linear needs {weight.shape[0] + 1} offsets, not {list(offsets.shape)}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise UserError(f"grouped_linear needs bias {list(weight.shape[:2])}, not {list(bias.shape)}")
    rows, weight, bias = operands("grouped_linear", rows, weight, bias)
    return _Grouped.apply(rows, weight, offsets, bias)  # type: ignore[return-value]
