"""Plain expert MLPs: down(act(up(x) + up_bias)) + down_bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import autocast_off, autocast_to
from .activations import activation_named
from .shapes import blocks, check_mlp

__all__ = ["mlp"]


class _Mlp(torch.autograd.Function):
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
        bounds = offsets.tolist()
        act = activation_named(activation)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        hidden: list[Tensor] = []
        with autocast_off(rows.device):
            for e, (first, second) in enumerate(zip(*blocks(up, down, None))):
                start, stop = bounds[e], bounds[e + 1]
                if start == stop:
                    continue
                x = rows[start:stop].t()
                pre = torch.mm(first, x) if up_bias is None else torch.addmm(up_bias[e][:, None], first, x)
                h = torch.empty_like(pre)
                act.forward(pre, out=h)
                if down_bias is None:
                    torch.mm(h.t(), second, out=out[start:stop])
                else:
                    torch.addmm(down_bias[e], h.t(), second, out=out[start:stop])
                hidden.append(pre)
        out[bounds[-1] :].zero_()
        ctx.save_for_backward(rows, up, down, *hidden)
        ctx.bounds, ctx.activation = bounds, act
        ctx.biases = (None if up_bias is None else up_bias.shape, None if down_bias is None else down_bias.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, up, down, *hidden = ctx.saved_tensors
        bounds, act = ctx.bounds, ctx.activation
        grad = grads[0].contiguous()
        d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
        d_rows[bounds[-1] :].zero_()
        d_up, d_down = torch.empty_like(up), torch.empty_like(down)
        d_up_bias, d_down_bias = (None if s is None else rows.new_zeros(s) for s in ctx.biases)
        saved = iter(hidden)
        with autocast_off(rows.device):
            for e, (first, second, d_first, d_second) in enumerate(
                zip(*blocks(up, down, None), *blocks(d_up, d_down, None))
            ):
                start, stop = bounds[e], bounds[e + 1]
                if start == stop:
                    d_first.zero_()
                    d_second.zero_()
                    continue
                x, g = rows[start:stop], grad[start:stop]
                pre = next(saved)
                h = torch.empty_like(pre)
                act.forward(pre, out=h)
                torch.mm(h, g, out=d_second)
                d_pre = torch.mm(second, g.t())
                act.backward(d_pre, pre, out=d_pre)
                torch.mm(d_pre.t(), first, out=d_rows[start:stop])
                torch.mm(d_pre, x, out=d_first)
                if d_up_bias is not None:
                    torch.sum(d_pre, 1, out=d_up_bias[e])
                if d_down_bias is not None:
                    torch.sum(g, 0, out=d_down_bias[e])
        return d_rows, d_up, d_down, None, None, d_up_bias, d_down_bias


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
    check_mlp(rows, up, down, offsets)
    rows, up, down, up_bias, down_bias = autocast_to(rows, up, down, up_bias, down_bias)
    return _Mlp.apply(rows, up, down, offsets, activation, up_bias, down_bias)  # type: ignore[return-value]
