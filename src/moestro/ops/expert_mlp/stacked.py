"""Experts through whole grouped products: few calls, for devices where calls are dear and experts with little to do."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import grouped
from ..combine.sums import sum_rows
from ..grouped import fused, native
from ..grouped.choose import Backend
from ..precision import sum_dtype
from .activations import activation_of, lifted
from .by_expert import table_of
from .problem import Grads, Problem, Spec, Wanted

__all__ = ["backward", "forward", "products_for", "supported"]

NAME = "whole_products"

# Hidden values per expert from which going expert by expert is faster on a CPU, because they stay in cache. Measured
# forward and backward in fp32 (D 64-512, F 64-256, E 8-64, 8 to 1024 rows per expert; time by expert over time of whole
# products): 2.1 at 1024 values, 1.4 at 4096, 1.02-1.06 at 16k-32k, 0.89-0.98 at 64k and more.
CACHED = 2**16


def supported(spec: Spec) -> tuple[bool, str]:
    """Equal widths; on the CPU only where this is the faster way."""
    if spec.deterministic:
        return False, "torch's products round differently for one row than for many"
    if spec.unequal:
        return False, "the widths differ"
    chosen = products_for(spec)
    if spec.device != "cpu":
        return True, f"whole products by {chosen.NAME}"
    if chosen is native:
        return True, f"whole products by {chosen.NAME}"
    if spec.rows * spec.width >= CACHED * spec.experts:
        return False, f"{CACHED} or more hidden values per expert stay in cache if experts take turns"
    if chosen is not fused:
        return False, f"{chosen.NAME} saves no calls"
    return True, "experts have little to do each"


def products_for(spec: Spec) -> Backend:
    """The grouped product for both maps of the experts."""
    first = grouped.Spec(
        device=spec.device,
        dtype=spec.dtype,
        rows=spec.rows,
        inputs=spec.dim,
        outputs=(2 if spec.gated else 1) * spec.width,
        experts=spec.experts,
        capability=spec.capability,
    )
    second = grouped.Spec(
        device=spec.device,
        dtype=spec.dtype,
        rows=spec.rows,
        inputs=spec.width,
        outputs=spec.dim,
        experts=spec.experts,
        capability=spec.capability,
    )
    return grouped.choose(first, second)


def forward(p: Problem, save: bool, products: Backend | None = None) -> tuple[Tensor, Tensor]:
    """y and the pre-activations [R, 2F] or [R, F] (of no rows, unless they are saved)."""
    act, by = activation_of(p.activation, p.clamp), products or products_for(p.spec())
    rows = p.x if p.unit is None else p.x.index_select(0, p.unit)
    pre = by.products(rows, p.first, p.offsets, p.first_bias).contiguous()
    gate, up = (pre[:, : p.width], pre[:, p.width :]) if p.gated else (pre, None)
    h = torch.empty_like(gate, memory_format=torch.contiguous_format)
    act.forward(gate, h)
    if up is not None:
        h.mul_(lifted(up, p.clamp))
    out = by.products(h, p.down, p.offsets, p.down_bias)
    y = out.contiguous() if p.inverse is None else sum_rows(out, p.weight, p.inverse)
    return y, pre if save else pre.new_empty(0)


def backward(p: Problem, hidden: Tensor, grad: Tensor, wanted: Wanted, products: Backend | None = None) -> Grads:
    """The gradients that are wanted."""
    act, by = activation_of(p.activation, p.clamp), products or products_for(p.spec())
    gate, up = (hidden[:, : p.width], hidden[:, p.width :]) if p.gated else (hidden, None)
    g = grad if p.unit is None else grad.index_select(0, p.unit)
    w = p.row_weights()
    d_h = by.transposed_products(g, p.down, p.offsets)
    h = torch.empty_like(d_h)
    act.forward(gate, h)
    d_pre = torch.empty_like(hidden)
    if up is not None:
        torch.mul(d_h, h, out=d_pre[:, p.width :])
        if p.clamp is not None:
            d_pre[:, p.width :].mul_(p.clamp.inside(up))
            up = lifted(up, p.clamp)
        h.mul_(up)
    d_weight = None
    if wanted.weight:
        dots = (d_h * h).sum(1, dtype=sum_dtype(h.dtype))
        if p.down_bias is not None:
            dots += _dots_with_bias(p, g)
        d_weight = table_of(p, dots)
    weighed = g
    if w is not None:
        w = w[:, None]
        weighed = (g * w).to(g.dtype)
    d_down = by.outer(weighed, h, p.offsets).contiguous() if wanted.down else None
    d_down_bias = by.columns(weighed, p.offsets).contiguous() if wanted.down_bias else None
    act.backward(d_h if up is None else d_h.mul_(up), gate, d_pre[:, : p.width])
    if w is not None:
        d_pre.mul_(w)
    d_x = None
    if wanted.x:
        d_x = by.transposed_products(d_pre, p.first, p.offsets)
        d_x = d_x.contiguous() if p.inverse is None else sum_rows(d_x, None, p.inverse)
    return Grads(
        x=d_x,
        weight=d_weight,
        first=by.outer(d_pre, p.x if p.unit is None else p.x.index_select(0, p.unit), p.offsets).contiguous()
        if wanted.first
        else None,
        down=d_down,
        first_bias=by.columns(d_pre, p.offsets).contiguous() if wanted.first_bias else None,
        down_bias=d_down_bias,
    )


def _dots_with_bias(p: Problem, g: Tensor) -> Tensor:
    """[R]: <g[r], the down bias of the row's expert>."""
    assert p.down_bias is not None
    expert = torch.bucketize(torch.arange(g.shape[0], device=g.device), p.offsets[1:], right=True)
    bias = p.down_bias.index_select(0, expert.clamp_max_(p.num_experts - 1))
    return (g * bias).sum(1, dtype=sum_dtype(g.dtype))
