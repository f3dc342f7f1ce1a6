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
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        ctx.transposed = transposed
        weight = weight.transpose(1, 2) if transposed else weight
        ctx.backend = choose(Spec.of(rows, weight))
        with autocast_off(rows.device):
            return ctx.backend.products(rows, weight, offsets, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, offsets = ctx.saved_tensors
        weight = weight.transpose(1, 2) if ctx.transposed else weight
        backend, grad = ctx.backend, grads[0].contiguous()  # it may be expanded
        d_rows = d_weight = d_bias = None
        with autocast_off(rows.device):
            if ctx.needs_input_grad[0]:
                d_rows = backend.transposed_products(grad, weight, offsets)
            if ctx.needs_input_grad[1]:  # in the layout of the weight: nobody has to turn it round
                d_weight = backend.outer(*((rows, grad) if ctx.transposed else (grad, rows)), offsets)
            if ctx.needs_input_grad[3]:
                d_bias = backend.columns(grad, offsets)
        return d_rows, d_weight, None, d_bias, None


def grouped_linear(
    rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """Each row times the matrix of its group: y[r] = weight[e] @ rows[r] + bias[e] for offsets[e] <= r < offsets[e+1].

    Shapes: rows [R, I], weight [E, O, I] (transposed: [E, I, O]), offsets [E+1] int64, bias [E, O] or None -> [R, O].
    Groups without rows get gradients of exact zeros. Under autocast the operands are cast; gradients come back in the
    parameters' dtype.
    """
    O, I = (2, 1) if transposed else (1, 2)
    if rows.ndim != 2 or weight.ndim != 3 or rows.shape[1] != weight.shape[I]:
        raise UserError(
            f"grouped_linear needs rows [R, I] and weight {'[E, I, O]' if transposed else '[E, O, I]'}, not "
            f"{list(rows.shape)} and {list(weight.shape)}"
        )
    if offsets.shape != (weight.shape[0] + 1,):
        raise UserError(f"grouped_linear needs {weight.shape[0] + 1} offsets, not {list(offsets.shape)}")
    if bias is not None and bias.shape != (weight.shape[0], weight.shape[O]):
        raise UserError(f"grouped_linear needs bias {[weight.shape[0], weight.shape[O]]}, not {list(bias.shape)}")
    rows, weight, bias = operands("grouped_linear", rows, weight, bias)
    return _Grouped.apply(rows, weight, offsets, bias, transposed)  # type: ignore[return-value]
