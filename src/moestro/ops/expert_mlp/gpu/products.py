"""Triton kernels: products of rows sorted by expert with their experts' matrices.

Rows and columns past the end are read from inside (clamped or wrapped) and never written: no masks in the inner loops.
Only the inner dimension is masked, where it is no multiple of its block. It is passed twice: as a constant, and as a
number `depth` to count to, because a loop of known length is unrolled until registers spill.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, slope
from .tiles import locate

__all__ = ["first_kernel", "hidden_grad_kernel", "product_kernel"]


@triton.jit
def halves(tile):
    """The left and the right columns of a tile: what follows a product is done for half of the columns at a time.

    A whole tile of everything that an activation and its derivative need does not fit the registers.
    """
    parts = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit(do_not_specialize=["bound", "depth"])
def first_kernel(
    x,  # [T, D], or the rows themselves
    unit,  # [R] int64 or None
    first,  # [E, F, D] or gated [E, 2F, D]
    bias,  # [E, F] or None
    tiles,
    hidden,  # [R, F], written: act(gate) * up, or act(pre)
    pre,  # [R, 2F] or [R, F], written; or None
    bound,
    depth,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gather, the first product and the activation."""
    expert, start, stop, column = locate(tiles, bound, tl.cdiv(F, BN), GROUP)
    if (expert < 0) | (expert >= E):
        return
    rows = start + tl.arange(0, BM)
    cols = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    source = tl.minimum(rows, stop - 1).to(tl.int64)
    if unit is not None:
        source = tl.load(unit + source)
    HEIGHT: tl.constexpr = 2 * F if GATED else F
    a_at = x + source[:, None] * D + k[None, :]
    gate_from = first + expert.to(tl.int64) * HEIGHT * D
    up_from = gate_from + F * D
    place = (cols % F)[None, :] * D + k[:, None]
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for step in range(0, depth, BK):
        if D % BK == 0:
            a = tl.load(a_at)
            gate = tl.dot(a, tl.load(gate_from + place), gate, input_precision="ieee")
            if GATED:
                up = tl.dot(a, tl.load(up_from + place), up, input_precision="ieee")
        else:
            inside = k < D - step
            a = tl.load(a_at, mask=inside[None, :], other=0.0)
            gate = tl.dot(a, tl.load(gate_from + place, mask=inside[:, None], other=0.0), gate, input_precision="ieee")
            if GATED:
                b = tl.load(up_from + place, mask=inside[:, None], other=0.0)
                up = tl.dot(a, b, up, input_precision="ieee")
        a_at += BK
        gate_from += BK
        up_from += BK
    if bias is not None:
        gate += tl.load(bias + expert.to(tl.int64) * F + cols % F).to(tl.float32)[None, :]
    gate_left, gate_right = halves(gate)
    up_left, up_right = halves(up)
    half = column * BN + tl.arange(0, BN // 2)
    _finish_first(gate_left, up_left, half, hidden, pre, start, stop, F, GATED, ACT, BM)
    _finish_first(gate_right, up_right, half + BN // 2, hidden, pre, start, stop, F, GATED, ACT, BM)


@triton.jit
def _finish_first(
    gate,
    up,
    cols,
    hidden,
    pre,
    start,
    stop,
    F: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
):
    """Writes the pre-activations [BM, columns], where they are wanted, and the hidden values."""
    HEIGHT: tl.constexpr = 2 * F if GATED else F
    below = tl.arange(0, BM)
    mask = (start + below < stop)[:, None] & (cols < F)[None, :]
    if pre is not None:
        at = pre + start.to(tl.int64) * HEIGHT + (below[:, None] * HEIGHT + cols[None, :])
        tl.store(at, gate.to(pre.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(at + F, up.to(pre.dtype.element_ty), mask=mask)
    h = activate(gate, ACT)
    if GATED:
        h *= up
    at = hidden + start.to(tl.int64) * F + (below[:, None] * F + cols[None, :])
    tl.store(at, h.to(hidden.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["bound", "depth"])
def product_kernel(
    rows_in,  # [R, I]
    matrix,  # [E, O, I], or [E, I, O] where TRANSPOSED
    bias,  # [E, O] or None
    tiles,
    out,  # [R, O], written; zeros for rows that belong to nobody
    bound,
    depth,
    E: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Every row times the matrix of its expert."""
    expert, start, stop, column = locate(tiles, bound, tl.cdiv(O, BN), GROUP)
    if expert < 0:
        return
    rows = start + tl.arange(0, BM)
    cols = column * BN + tl.arange(0, BN)
    mask = (rows < stop)[:, None] & (cols < O)[None, :]
    out_at = out + start.to(tl.int64) * O + ((rows - start)[:, None] * O + cols[None, :])
    if expert == E:
        tl.store(out_at, tl.zeros((BM, BN), out.dtype.element_ty), mask=mask)
        return
    # One pointer each that moves, and 32-bit places that do not: fewer registers than a tile of pointers.
    k = tl.arange(0, BK)
    a_from = rows_in + start.to(tl.int64) * I
    a_place = tl.minimum(rows - start, stop - 1 - start)[:, None] * I + k[None, :]
    b_from = matrix + expert.to(tl.int64) * O * I
    if TRANSPOSED:
        b_place = k[:, None] * O + (cols % O)[None, :]
    else:
        b_place = k[:, None] + (cols % O)[None, :] * I
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, depth, BK):
        if I % BK == 0:
            acc = tl.dot(tl.load(a_from + a_place), tl.load(b_from + b_place), acc, input_precision="ieee")
        else:
            inside = k < I - step
            a = tl.load(a_from + a_place, mask=inside[None, :], other=0.0)
            b = tl.load(b_from + b_place, mask=inside[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        a_from += BK
        b_from += BK * O if TRANSPOSED else BK
    if bias is not None:
        acc += tl.load(bias + expert.to(tl.int64) * O + cols % O).to(tl.float32)[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["bound", "depth", "R"])
def hidden_grad_kernel(
    grad,  # [T, D], or one row each
    unit,  # [R] int64 or None
    slot,  # [R] int64 or None
    weight,  # [T, K] or None
    down,  # [E, D, F]
    down_bias,  # [E, D] or None
    pre,  # [R, 2F] or [R, F]
    tiles,
    d_pre,  # like pre, written
    scaled,  # [R, F], written: weight * hidden; or None
    dots,  # [column tiles, R] fp32, written: parts of <grad, row's output>; or None
    bound,
    depth,
    R,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The gradient of the hidden values, without the weight, and all that follows from it row by row.

    <grad, down h> = <grad down, h>: the weight's gradient needs no output row. The weight scales what comes after.
    """
    expert, start, stop, column = locate(tiles, bound, tl.cdiv(F, BN), GROUP)
    if (expert < 0) | (expert >= E):
        return
    rows = start + tl.arange(0, BM)
    cols = column * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    safe = tl.minimum(rows, stop - 1).to(tl.int64)
    source = safe
    if unit is not None:
        source = tl.load(unit + safe)
    a_at = grad + source[:, None] * D + k[None, :]
    b_from = down + expert.to(tl.int64) * D * F
    b_place = k[:, None] * F + (cols % F)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    outer = tl.zeros((BM,), tl.float32)
    for step in range(0, depth, BK):
        if D % BK == 0:
            a = tl.load(a_at)
            b = tl.load(b_from + b_place)
        else:
            inside = k < D - step
            a = tl.load(a_at, mask=inside[None, :], other=0.0)
            b = tl.load(b_from + b_place, mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if (dots is not None) and (down_bias is not None):
            part = tl.load(down_bias + expert.to(tl.int64) * D + step + k, mask=k < D - step, other=0.0)
            outer += tl.sum(a.to(tl.float32) * part.to(tl.float32)[None, :], 1)
        a_at += BK
        b_from += BK * F
    w = tl.full((BM,), 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + source * K + tl.load(slot + safe)).to(tl.float32)
    left, right = halves(acc)
    half = column * BN + tl.arange(0, BN // 2)
    dot = _finish_hidden_grad(left, w, half, pre, d_pre, scaled, start, stop, F, GATED, ACT, BM)
    dot += _finish_hidden_grad(right, w, half + BN // 2, pre, d_pre, scaled, start, stop, F, GATED, ACT, BM)
    if dots is not None:
        if down_bias is not None:
            dot += tl.where(column == 0, outer, 0.0)
        tl.store(dots + column.to(tl.int64) * R + rows, dot, mask=rows < stop)


@triton.jit
def _finish_hidden_grad(
    acc,
    w,
    cols,
    pre,
    d_pre,
    scaled,
    start,
    stop,
    F: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
):
    """From grad down [BM, columns], not weighted: writes d_pre and weight * hidden; returns <it, hidden> [BM]."""
    HEIGHT: tl.constexpr = 2 * F if GATED else F
    below = tl.arange(0, BM)
    mask = (start + below < stop)[:, None] & (cols < F)[None, :]
    place = below[:, None] * HEIGHT + cols[None, :]  # 32 bits within a tile: places take few registers
    pre_at = pre + start.to(tl.int64) * HEIGHT + place
    d_pre_at = d_pre + start.to(tl.int64) * HEIGHT + place
    gate = tl.load(pre_at, mask=mask, other=0.0).to(tl.float32)
    h = activate(gate, ACT)
    if GATED:
        up = tl.load(pre_at + F, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_pre_at + F, (acc * w[:, None] * h).to(d_pre.dtype.element_ty), mask=mask)
        h *= up
    dot = tl.sum(tl.where(mask, acc * h, 0.0), 1)
    acc *= w[:, None]
    if scaled is not None:
        at = scaled + start.to(tl.int64) * F + (below[:, None] * F + cols[None, :])
        tl.store(at, (h * w[:, None]).to(scaled.dtype.element_ty), mask=mask)
    if GATED:
        acc *= up
    tl.store(d_pre_at, (acc * slope(gate, ACT)).to(d_pre.dtype.element_ty), mask=mask)
    return dot
