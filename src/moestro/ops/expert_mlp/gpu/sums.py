"""Triton kernels: sums over an expert's rows and over a unit's choices, each in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["columns_kernel", "combine_kernel", "dots_kernel", "outer_kernel"]


@triton.jit
def outer_kernel(
    left,  # [R, M]; LEFT: [T, M], read through unit
    right,  # [R, N]; not LEFT: [T, N], read through unit
    unit,  # [R] int64 or None
    offsets,  # [E+1] int64
    out,  # [E, M, N], written; zeros for experts without rows
    LEFT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The sum over each expert's rows of left[r] right[r]^T: the gradient of its matrix."""
    down: tl.constexpr = tl.cdiv(M, BM)
    across: tl.constexpr = tl.cdiv(N, BN)
    program = tl.program_id(0)
    expert = (program // (down * across)).to(tl.int64)
    place = program % (down * across)
    top = (place // (GROUP * across)) * GROUP
    size = tl.minimum(down - top, GROUP)
    m = (top + (place % (GROUP * across)) % size) * BM + tl.arange(0, BM)
    n = ((place % (GROUP * across)) // size) * BN + tl.arange(0, BN)
    start = tl.load(offsets + expert).to(tl.int32)
    stop = tl.load(offsets + expert + 1).to(tl.int32)
    acc = tl.zeros((BM, BN), tl.float32)
    k = tl.arange(0, BK)
    # The units of the next step are read ahead: then the loads of values can be in flight for several steps.
    source = (start + k).to(tl.int64)
    if unit is not None:
        source = tl.load(unit + start + k, mask=start + k < stop, other=0)
    for step in range(start, stop, BK):
        rows = step + k
        inside = rows < stop
        i = source if LEFT else rows.to(tl.int64)
        j = rows.to(tl.int64) if LEFT else source
        a = tl.load(left + i[None, :] * M + (m % M)[:, None], mask=inside[None, :], other=0.0)
        b = tl.load(right + j[:, None] * N + (n % N)[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        source = (rows + BK).to(tl.int64)
        if unit is not None:
            source = tl.load(unit + rows + BK, mask=rows + BK < stop, other=0)
    at = out + expert * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def columns_kernel(
    values,  # [R, N], or [T, N] read through unit
    unit,  # [R] int64 or None
    slot,  # [R] int64 or None
    weight,  # [T, K] or None
    offsets,  # [E+1] int64
    out,  # [E, N], written
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The sum over each expert's rows of weight * values[r]: the gradient of its bias."""
    expert = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    start = tl.load(offsets + expert).to(tl.int32)
    stop = tl.load(offsets + expert + 1).to(tl.int32)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(start, stop, BM):
        rows = step + tl.arange(0, BM)
        inside = rows < stop
        source = rows.to(tl.int64)
        if unit is not None:
            source = tl.load(unit + rows, mask=inside, other=0)
        mask = inside[:, None] & (n < N)[None, :]
        value = tl.load(values + source[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if weight is not None:
            w = tl.load(weight + source * K + tl.load(slot + rows, mask=inside, other=0), mask=inside, other=0.0)
            value *= w.to(tl.float32)[:, None]
        acc += value
    tl.store(out + expert * N + n, tl.sum(acc, 0).to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    rows,  # [R, D]
    weight,  # [T, K] or None
    inverse,  # [T, K] int64
    out,  # [T, D], written
    T,
    D: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The (weighted) sum of a unit's rows, k = 0..K-1, in fp32. A choice without a row adds nothing."""
    t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(K):
        row = tl.load(inverse + t * K + k, mask=t < T, other=-1)
        mask = (row >= 0)[:, None] & (cols < D)[None, :]
        value = tl.load(rows + row[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if weight is not None:
            value *= tl.load(weight + t * K + k, mask=row >= 0, other=0.0).to(tl.float32)[:, None]
        acc += value
    mask = (t < T)[:, None] & (cols < D)[None, :]
    tl.store(out + t[:, None] * D + cols[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "places"])
def dots_kernel(
    dots,  # [parts, R] fp32
    inverse,  # [T, K] int64
    out,  # [T, K], written
    R,
    places,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
):
    """The gradient of the weights: the parts of every row's dot product, summed in order, at its place in the table."""
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    row = tl.load(inverse + i, mask=i < places, other=-1)
    acc = tl.zeros((BN,), tl.float32)
    for part in range(PARTS):
        acc += tl.load(dots + part * R.to(tl.int64) + row, mask=row >= 0, other=0.0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < places)
