"""Plain expert MLPs: down(act(up(x) + up_bias)) + down_bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import autocast_off, operands
from .activations import activation_named
from .shapes import Groups, blocks, check_mlp
from .stacked import StackedMlp, whole_products

__all__ = ["mlp"]


class _Mlp(torch.autograd.Function):
    """One pass over the experts; pre-activations are kept transposed, [F, n], in one flat buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        up: Tensor,
        down: Tensor,
        offsets: Tensor,
        activation: str,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        act = activation_named(activation)
        E, F = up.shape[0], up.shape[1]
        ctx.groups = Groups(offsets, rows.shape[0])
        sizes = [F * n for n in ctx.groups.counts]
        hidden = rows.new_empty(sum(sizes))
        scratch = rows.new_empty(max(sizes, default=0))
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        biases = ([None] * E if b is None else b.unbind(0) for b in (up_bias, down_bias))
        values = zip(ctx.groups.split(rows), ctx.groups.split(out), hidden.split(sizes))
        with autocast_off(rows.device):
            for (x, y, flat), first, second, b1, b2 in zip(values, *blocks(up, down, None), *biases):
                n = x.shape[0]
                if n == 0:
                    continue
                pre, h = flat.view(F, n), scratch[: F * n].view(F, n)
                _affine(first, x.t(), None if b1 is None else b1[:, None], pre)
                act.forward(pre, h)
                _affine(h.t(), second, b2, y)
        ctx.groups.tail(out).zero_()
        ctx.save_for_backward(rows, up, down, hidden)
        ctx.activation, ctx.sizes, ctx.biased = act, sizes, (up_bias is not None, down_bias is not None)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, up, down, hidden = ctx.saved_tensors
        act, groups, sizes = ctx.activation, ctx.groups, ctx.sizes
        E, F, D = up.shape
        grad = grads[0].contiguous()  # it may be expanded
        d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
        d_up = torch.empty_like(up, memory_format=torch.contiguous_format)
        d_down = torch.empty_like(down, memory_format=torch.contiguous_format)
        d_up_bias = rows.new_zeros(E, F) if ctx.biased[0] else None
        d_down_bias = rows.new_zeros(E, D) if ctx.biased[1] else None
        h_buffer, d_buffer = rows.new_empty(max(sizes, default=0)), rows.new_empty(max(sizes, default=0))
        matrices = zip(*blocks(up, down, None), *blocks(d_up, d_down, None))
        values = zip(groups.split(rows), groups.split(grad), groups.split(d_rows), hidden.split(sizes))
        with autocast_off(rows.device):
            for e, ((first, second, d_first, d_second), (x, g, d_x, flat)) in enumerate(zip(matrices, values)):
                n = x.shape[0]
                if n == 0:
                    d_first.zero_()
                    d_second.zero_()
                    continue
                pre, h, d_pre = (b[: F * n].view(F, n) for b in (flat, h_buffer, d_buffer))
                act.forward(pre, h)
                torch.mm(h, g, out=d_second)
                torch.mm(second, g.t(), out=d_pre)
                act.backward(d_pre, pre, d_pre)
                torch.mm(d_pre.t(), first, out=d_x)
                torch.mm(d_pre, x, out=d_first)
                if d_up_bias is not None:
                    torch.sum(d_pre, 1, out=d_up_bias[e])
                if d_down_bias is not None:
                    torch.sum(g, 0, out=d_down_bias[e])
        groups.tail(d_rows).zero_()
        return d_rows, d_up, d_down, None, None, d_up_bias, d_down_bias


def _affine(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def mlp(
    rows: Tensor,
    up: Tensor,
    down: Tensor,
    offsets: Tensor,
    activation: str = "gelu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Plain experts on sorted rows: y[r] = down_e act(up_e x[r] + up_bias_e) + down_bias_e, e the expert of row r.

    Shapes: rows [R, D], up [E, F, D], down [E, D, F], offsets [E+1] int64, up_bias [E, F] or None, down_bias [E, D] or
    None -> [R, D]. Experts without rows get gradients of exact zeros. Raises `UserError` for shapes that do not fit.
    """
    check_mlp(rows, up, down, offsets, up_bias, down_bias)
    rows, up, down, up_bias, down_bias = operands("mlp", rows, up, down, up_bias, down_bias)
    backend = whole_products(rows, up, down)
    if backend is None:
        return _Mlp.apply(rows, up, down, offsets, activation, up_bias, down_bias)  # type: ignore[return-value]
    return StackedMlp.apply(rows, up, down, offsets, activation, up_bias, down_bias, backend)  # type: ignore[return-value]
