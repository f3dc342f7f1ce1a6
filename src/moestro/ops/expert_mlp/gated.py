"""Gated expert MLPs: down(act(gate(x)) * up(x))."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import autocast_off, autocast_to
from .activations import activation_named
from .shapes import blocks, check_gated

__all__ = ["gated_mlp"]


class _Gated(torch.autograd.Function):
    """Hidden values are kept transposed, [2F, rows of e], so that gate and up halves are contiguous."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gate_up: Tensor,
        down: Tensor,
        offsets: Tensor,
        activation: str,
        widths: tuple[int, ...] | None,
    ) -> Tensor:
        bounds = offsets.tolist()
        act = activation_named(activation)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        hidden: list[Tensor] = []
        with autocast_off(rows.device):
            for e, (first, second) in enumerate(zip(*blocks(gate_up, down, widths))):
                start, stop = bounds[e], bounds[e + 1]
                if start == stop:
                    continue
                both = torch.mm(first, rows[start:stop].t())
                gate, up = both.chunk(2)
                h = torch.empty_like(gate)
                act.forward(gate, out=h)
                h.mul_(up)
                torch.mm(h.t(), second, out=out[start:stop])
                hidden.append(both)
        out[bounds[-1] :].zero_()
        ctx.save_for_backward(rows, gate_up, down, *hidden)
        ctx.bounds, ctx.activation, ctx.widths = bounds, act, widths
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, down, *hidden = ctx.saved_tensors
        bounds, act, widths = ctx.bounds, ctx.activation, ctx.widths
        grad = grads[0].contiguous()
        d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
        d_rows[bounds[-1] :].zero_()
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        saved = iter(hidden)
        both_blocks = zip(*blocks(gate_up, down, widths), *blocks(d_gate_up, d_down, widths))
        with autocast_off(rows.device):
            for e, (first, second, d_first, d_second) in enumerate(both_blocks):
                start, stop = bounds[e], bounds[e + 1]
                if start == stop:
                    d_first.zero_()
                    d_second.zero_()
                    continue
                x, g = rows[start:stop], grad[start:stop]
                gate, up = next(saved).chunk(2)
                d_both = rows.new_empty(2 * gate.shape[0], stop - start)
                d_gate, d_up = d_both.chunk(2)
                h = torch.empty_like(gate)
                d_h = torch.mm(second, g.t())
                act.forward(gate, out=h)
                torch.mul(d_h, h, out=d_up)
                h.mul_(up)
                torch.mm(h, g, out=d_second)
                d_h.mul_(up)
                act.backward(d_h, gate, out=d_gate)
                torch.mm(d_both.t(), first, out=d_rows[start:stop])
                torch.mm(d_both, x, out=d_first)
        return d_rows, d_gate_up, d_down, None, None, None


def gated_mlp(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    activation: str = "silu",
    widths: tuple[int, ...] | None = None,
) -> Tensor:
    """Gated experts on sorted rows: y[r] = down_e (act(gate_e x[r]) * (up_e x[r])), e the expert of row r.

    Shapes: rows [R, D], offsets [E+1] int64 -> [R, D]. Equal widths: gate_up [E, 2F, D] (gate rows first), down
    [E, D, F]. Unequal widths F_e, given in `widths`: the experts' blocks one after the other, gate_up [sum 2F_e, D] and
    down transposed, [sum F_e, D], so that the block of an expert is contiguous in both.
    Experts without rows get gradients of exact zeros. Activations: silu, gelu, gelu_tanh, relu, relu2.
    Raises `UserError` for shapes that do not fit.
    """
    check_gated(rows, gate_up, down, offsets, widths)
    rows, gate_up, down = autocast_to(rows, gate_up, down)
    return _Gated.apply(rows, gate_up, down, offsets, activation, widths)  # type: ignore[return-value]
