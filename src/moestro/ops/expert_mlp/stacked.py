"""Experts through whole grouped products: few calls, for devices where calls are dear and experts with little to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..grouped import Spec, choose, fused
from ..grouped.choose import Backend
from ..precision import autocast_off
from .activations import activation_named

__all__ = ["StackedGated", "StackedMlp", "whole_products"]

# Hidden values per expert from which going expert by expert is faster on a CPU, because they stay in cache. Measured
# forward and backward in fp32 (D 64-512, F 64-256, E 8-64, 8 to 1024 rows per expert; time by expert over time of whole
# products): 2.1 at 1024 values, 1.4 at 4096, 1.02-1.06 at 16k-32k, 0.89-0.98 at 64k and more.
CACHED = 2**16


def whole_products(rows: Tensor, first: Tensor, down: Tensor) -> Backend | None:
    """The backend for whole products over rows [R, D] and banks [E, *, D], [E, D, F], or None: one expert at a time."""
    specs = Spec.of(rows, first), Spec.of(rows, down)
    if rows.device.type != "cpu":
        return choose(*specs)
    small = rows.shape[0] * down.shape[2] < CACHED * down.shape[0]
    return fused if small and choose(*specs) is fused else None  # type: ignore[return-value]


class StackedGated(torch.autograd.Function):
    """down(act(gate(x)) * up(x)); saves its inputs and the pre-activations [R, 2F]."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, activation: str, backend: Backend
    ) -> Tensor:
        ctx.activation, ctx.backend = activation_named(activation), backend
        with autocast_off(rows.device):
            both = backend.products(rows, gate_up, offsets)
            gate, up = both.chunk(2, dim=1)
            h = torch.empty_like(gate, memory_format=torch.contiguous_format)
            ctx.activation.forward(gate, h)
            out = backend.products(h.mul_(up), down, offsets)
        ctx.save_for_backward(rows, gate_up, down, offsets, both)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, down, offsets, both = ctx.saved_tensors
        act, backend, grad = ctx.activation, ctx.backend, grads[0].contiguous()
        gate, up = both.chunk(2, dim=1)
        with autocast_off(rows.device):
            d_h = backend.transposed_products(grad, down, offsets)
            h = torch.empty_like(d_h)
            act.forward(gate, h)
            d_both = torch.empty_like(both)
            torch.mul(d_h, h, out=d_both[:, up.shape[1] :])
            d_down = backend.outer(grad, h.mul_(up), offsets)
            act.backward(d_h.mul_(up), gate, d_both[:, : up.shape[1]])
            d_rows = backend.transposed_products(d_both, gate_up, offsets)
            d_gate_up = backend.outer(d_both, rows, offsets)
        return d_rows, d_gate_up, d_down, None, None, None


class StackedMlp(torch.autograd.Function):
    """down(act(up(x) + up_bias)) + down_bias; saves its inputs and the pre-activations [R, F]."""

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
        backend: Backend,
    ) -> Tensor:
        ctx.activation, ctx.backend = activation_named(activation), backend
        with autocast_off(rows.device):
            pre = backend.products(rows, up, offsets, up_bias)
            h = torch.empty_like(pre)
            ctx.activation.forward(pre, h)
            out = backend.products(h, down, offsets, down_bias)
        ctx.save_for_backward(rows, up, down, offsets, pre)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, up, down, offsets, pre = ctx.saved_tensors
        act, backend, grad = ctx.activation, ctx.backend, grads[0].contiguous()
        with autocast_off(rows.device):
            h = torch.empty_like(pre)
            act.forward(pre, h)
            d_down = backend.outer(grad, h, offsets)
            d_pre = backend.transposed_products(grad, down, offsets)
            act.backward(d_pre, pre, d_pre)
            d_rows = backend.transposed_products(d_pre, up, offsets)
            d_up = backend.outer(d_pre, rows, offsets)
            d_up_bias = backend.columns(d_pre, offsets) if ctx.needs_input_grad[5] else None
            d_down_bias = backend.columns(grad, offsets) if ctx.needs_input_grad[6] else None
        return d_rows, d_up, d_down, None, None, d_up_bias, d_down_bias, None
