"""Routed experts by Triton kernels: what is launched, forward and backward.

Kept for the backward pass: the pre-activations [R, 2F] (plain: [R, F]) and nothing else that is routed. The gathered
rows are gathered again inside the loads; the hidden values and the slope of the activation are recomputed where the
gradient of the hidden values is finished; the experts' output rows are not needed, because
<grad, down h> = <grad down, h>. Recomputing the pre-activations too would save 4F bytes per row (gated, 16 bits) for
4DF FLOPs, two thirds of the forward pass; `checkpoint` around the layer does that for those who want it.
Beside what is kept, a backward pass holds the pre-activations' gradient, and either weighted hidden values [R, F] or
the rows' gradient [R, D]; a forward pass holds the hidden values [R, F] and the rows [R, D].
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from ..problem import Grads, Problem, Wanted
from .blocks import GROUP, Block, Blocks, blocks
from .products import first_kernel, hidden_grad_kernel, product_kernel
from .sums import columns_kernel, combine_kernel, dots_kernel, outer_kernel
from .tiles import FIELDS, schedule_kernel

__all__ = ["backward", "blocks_for", "forward"]


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], **options: int
) -> None:
    """Run a kernel: tensors and numbers first, then what it is compiled for.

    Fusing products with sums is asked for, because what is done by default depends on Triton's version.
    """
    kernel[grid](*args, **constants, **options, enable_fp_fusion=True)


def blocks_for(p: Problem) -> Blocks:
    """The block sizes of a problem, the same in forward and backward."""
    spec = p.spec()
    mean = None if p.deterministic else spec.rows / max(spec.experts, 1)
    return blocks(spec.capability, spec.dtype, spec.dim, spec.width, mean)


def forward(p: Problem, save: bool, sizes: Blocks | None = None) -> tuple[Tensor, Tensor]:
    """y [T, D] (sorted rows: [R, D]) and the pre-activations [R, 2F] or [R, F], of no rows if not `save`."""
    p = _contiguous(p)
    E, D, F = p.num_experts, p.x.shape[1], p.width
    R, H = p.hidden_shape()
    pre = p.x.new_empty(R if save else 0, H)
    sizes = sizes or blocks_for(p)
    with _on(p.x):
        tiles = _schedule(p, sizes.first.rows)
        hidden = p.x.new_empty(R, F)
        block = sizes.first
        launch(
            first_kernel,
            (tiles.shape[0] * triton.cdiv(F, block.cols),),
            (
                p.x,
                p.unit,
                p.first,
                p.first_bias,
                tiles,
                hidden,
                pre if save else None,
                tiles.shape[0],
                D,
            ),
            dict(E=E, D=D, F=F, GATED=p.gated, ACT=p.activation, **_inner(block)),
            **_options(block),
        )
        rows = _product(hidden, p.down, p.down_bias, tiles, sizes.product, transposed=False)
        return (rows if p.unit is None else _combine(p, rows, p.weight)), pre


def backward(p: Problem, hidden: Tensor, grad: Tensor, wanted: Wanted, sizes: Blocks | None = None) -> Grads:
    """The gradients that are wanted, from what `forward` saved and the gradient of y."""
    p, sizes = _contiguous(p), sizes or blocks_for(p)
    grad = grad.contiguous()  # it may be expanded
    d_x = d_weight = d_first = d_down = d_first_bias = d_down_bias = None
    with _on(p.x):
        tiles = _schedule(p, sizes.first.rows)
        if wanted.down_bias and p.down_bias is not None:
            d_down_bias = _columns(p, grad, p.down_bias, routed=True)
        if wanted.x or wanted.weight or wanted.first or wanted.down or wanted.first_bias:
            d_pre, scaled, dots = _hidden_grad(p, hidden, grad, tiles, sizes.hidden, wanted)
            if dots is not None:
                d_weight = _dots(p, dots)
            if scaled is not None:
                d_down = _outer(p, grad, scaled, p.down, sizes.outer, left_is_units=True)
                del scaled
            if wanted.first:
                d_first = _outer(p, d_pre, p.x, p.first, sizes.outer, left_is_units=False)
            if wanted.first_bias and p.first_bias is not None:
                d_first_bias = _columns(p, d_pre, p.first_bias, routed=False)
            if wanted.x:
                d_rows = _product(d_pre, p.first, None, tiles, sizes.product, transposed=True)
                d_x = d_rows if p.unit is None else _combine(p, d_rows, None)
    return Grads(d_x, d_weight, d_first, d_down, d_first_bias, d_down_bias)


def _schedule(p: Problem, height: int) -> Tensor:
    """[bound, 3] int32: expert, first row and row after the last of every tile; no look at the device's values."""
    E, R = p.num_experts, p.num_rows
    bound = triton.cdiv(R, height) + E
    tiles = torch.empty(bound, FIELDS, dtype=torch.int32, device=p.x.device)
    size = triton.next_power_of_2(E + 1)
    launch(schedule_kernel, (E + 1,), (p.offsets, tiles, R, bound), dict(E=E, BM=height, BE=size, BT=128), num_warps=4)
    return tiles


def _product(
    rows: Tensor, matrix: Tensor, bias: Tensor | None, tiles: Tensor, block: Block, *, transposed: bool
) -> Tensor:
    """[R, I] -> [R, O] with matrices [E, O, I], or [E, I, O] where transposed."""
    E, inner = matrix.shape[0], rows.shape[1]
    outputs = matrix.shape[2] if transposed else matrix.shape[1]
    out = rows.new_empty(rows.shape[0], outputs)
    launch(
        product_kernel,
        (tiles.shape[0] * triton.cdiv(outputs, block.cols),),
        (rows, matrix, bias, tiles, out, tiles.shape[0], inner),
        dict(E=E, I=inner, O=outputs, TRANSPOSED=transposed, **_inner(block)),
        **_options(block),
    )
    return out


def _combine(p: Problem, rows: Tensor, weight: Tensor | None) -> Tensor:
    """[R, D] -> [T, D]."""
    assert p.inverse is not None
    T, D, K = p.x.shape[0], rows.shape[1], p.inverse.shape[1]
    out = rows.new_empty(T, D)
    cols = min(512, triton.next_power_of_2(D))
    launch(
        combine_kernel,
        (triton.cdiv(T, 4), triton.cdiv(D, cols)),
        (rows, weight, p.inverse, out, T),
        dict(D=D, K=K, BM=4, BN=cols),
        num_warps=4,
    )
    return out


def _hidden_grad(
    p: Problem, pre: Tensor, grad: Tensor, tiles: Tensor, block: Block, wanted: Wanted
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """d_pre, like pre; weight * hidden [R, F] where down's gradient is wanted; parts of the weights' gradient."""
    E, D, F, R = p.num_experts, p.x.shape[1], p.width, p.num_rows
    parts = triton.cdiv(F, block.cols)
    d_pre = torch.empty_like(pre)
    scaled = pre.new_empty(R, F) if wanted.down else None
    dots = None
    if wanted.weight and p.weight is not None:
        dots = torch.empty(parts, R, dtype=torch.float32, device=pre.device)
    launch(
        hidden_grad_kernel,
        (tiles.shape[0] * parts,),
        (
            grad,
            p.unit,
            p.slot if p.weight is not None else None,
            p.weight,
            p.down,
            p.down_bias,
            pre,
            tiles,
            d_pre,
            scaled,
            dots,
            tiles.shape[0],
            D,
            R,
        ),
        dict(E=E, D=D, F=F, K=_choices(p), GATED=p.gated, ACT=p.activation, **_inner(block)),
        **_options(block),
    )
    return d_pre, scaled, dots


def _outer(p: Problem, left: Tensor, right: Tensor, like: Tensor, b: Block, *, left_is_units: bool) -> Tensor:
    """[E, M, N]: the gradient of an expert's matrix, from rows on one side and units on the other."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    E, M, N = like.shape
    launch(
        outer_kernel,
        (E * triton.cdiv(M, b.rows) * triton.cdiv(N, b.cols),),
        (left, right, p.unit, p.offsets, out),
        dict(LEFT=left_is_units, M=M, N=N, **_inner(b)),
        **_options(b),
    )
    return out


def _columns(p: Problem, values: Tensor, like: Tensor, *, routed: bool) -> Tensor:
    """[E, N]: the gradient of a bias, from units' gradients (gathered, weighted) or from rows as they are."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    E, N = like.shape
    weighted = routed and p.weight is not None
    launch(
        columns_kernel,
        (E, triton.cdiv(N, 64)),
        (
            values,
            p.unit if routed else None,
            p.slot if weighted else None,
            p.weight if weighted else None,
            p.offsets,
            out,
        ),
        dict(N=N, K=_choices(p), BM=32, BN=64),
        num_warps=4,
    )
    return out


def _dots(p: Problem, dots: Tensor) -> Tensor:
    """[T, K]: the gradient of the weights."""
    assert p.weight is not None
    assert p.inverse is not None
    out = torch.empty_like(p.weight, memory_format=torch.contiguous_format)
    places = out.numel()
    launch(
        dots_kernel,
        (triton.cdiv(places, 256),),
        (dots, p.inverse, out, dots.shape[1], places),
        dict(PARTS=dots.shape[0], BN=256),
        num_warps=4,
    )
    return out


def _inner(block: Block) -> dict[str, int]:
    return dict(BM=block.rows, BN=block.cols, BK=block.depth, GROUP=GROUP)


def _options(block: Block) -> dict[str, int]:
    return dict(num_warps=block.warps, num_stages=block.stages)


def _choices(p: Problem) -> int:
    return 1 if p.inverse is None else p.inverse.shape[1]


def _contiguous(p: Problem) -> Problem:
    """The problem with every tensor laid out row after row, which is how kernels find their places."""
    tensors = {k: v.contiguous() for k, v in vars(p).items() if isinstance(v, Tensor)}
    return dataclasses.replace(p, **tensors)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
