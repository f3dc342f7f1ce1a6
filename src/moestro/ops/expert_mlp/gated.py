"""Gated expert MLPs: down(act(gate(x)) * up(x))."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import autocast_off, operands
from .activations import activation_named
from .shapes import Groups, blocks, check_gated
from .stacked import StackedGated, whole_products

__all__ = ["gated_mlp"]


class _Gated(torch.autograd.Function):
    """One pass over the experts, so that an expert's hidden values stay in cache between its products.

    They are kept transposed, [2F, n] for n rows: the halves of gate and up are then contiguous. All pre-activations
    share one flat buffer, the only thing saved besides the inputs; the activation is computed again.
    """

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
        act = activation_named(activation)
        ctx.groups = Groups(offsets, rows.shape[0])
        firsts, seconds = blocks(gate_up, down, widths)
        sizes = [2 * w.shape[0] * n for w, n in zip(seconds, ctx.groups.counts)]
        hidden = rows.new_empty(sum(sizes))
        scratch = rows.new_empty(max(sizes, default=0) // 2)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        with autocast_off(rows.device):
            for x, y, first, second, flat in zip(
                ctx.groups.split(rows), ctx.groups.split(out), firsts, seconds, hidden.split(sizes)
            ):
                F, n = second.shape[0], x.shape[0]
                if n == 0:
                    continue
                both = flat.view(2 * F, n)
                torch.mm(first, x.t(), out=both)
                h = scratch[: F * n].view(F, n)
                act.forward(both[:F], h)
                torch.mm(h.mul_(both[F:]).t(), second, out=y)
        ctx.groups.tail(out).zero_()
        ctx.save_for_backward(rows, gate_up, down, hidden)
        ctx.activation, ctx.widths, ctx.sizes = act, widths, sizes
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, down, hidden = ctx.saved_tensors
        act, groups, sizes = ctx.activation, ctx.groups, ctx.sizes
        grad = grads[0].contiguous()  # it may be expanded
        d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
        d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        d_down = torch.empty_like(down, memory_format=torch.contiguous_format)
        most = max(sizes, default=0) // 2
        h_buffer, d_h_buffer, d_buffer = rows.new_empty(most), rows.new_empty(most), rows.new_empty(2 * most)
        matrices = zip(*blocks(gate_up, down, ctx.widths), *blocks(d_gate_up, d_down, ctx.widths))
        values = zip(groups.split(rows), groups.split(grad), groups.split(d_rows), hidden.split(sizes))
        with autocast_off(rows.device):
            for (first, second, d_first, d_second), (x, g, d_x, flat) in zip(matrices, values):
                F, n = second.shape[0], x.shape[0]
                if n == 0:
                    d_first.zero_()
                    d_second.zero_()
                    continue
                both, d_both = flat.view(2 * F, n), d_buffer[: 2 * F * n].view(2 * F, n)
                gate, up = both[:F], both[F:]
                h, d_h = h_buffer[: F * n].view(F, n), d_h_buffer[: F * n].view(F, n)
                torch.mm(second, g.t(), out=d_h)
                act.forward(gate, h)
                torch.mul(d_h, h, out=d_both[F:])
                torch.mm(h.mul_(up), g, out=d_second)
                act.backward(d_h.mul_(up), gate, d_both[:F])
                torch.mm(d_both.t(), first, out=d_x)
                torch.mm(d_both, x, out=d_first)
        groups.tail(d_rows).zero_()
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
    rows, gate_up, down = operands("gated_mlp", rows, gate_up, down)
    backend = None if widths is not None else whole_products(rows, gate_up, down)
    if backend is None:
        return _Gated.apply(rows, gate_up, down, offsets, activation, widths)  # type: ignore[return-value]
    return StackedGated.apply(rows, gate_up, down, offsets, activation, backend)  # type: ignore[return-value]
