"""Triton kernels: which rows a tile of a grouped product has, decided on the device."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FIELDS", "locate", "schedule_kernel"]

FIELDS = 3  # of a tile: expert, first row, row after the last


@triton.jit(do_not_specialize=["R", "bound"])
def schedule_kernel(
    offsets,  # [E+1] int64
    tiles,  # [bound, 3] int32, written: expert, start, stop
    R,
    bound,
    E: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
):
    """One program per expert, and one more for the rows that belong to nobody (expert E) and for unused tiles (-1)."""
    mine = tl.program_id(0)
    expert = tl.arange(0, BE)
    start = tl.load(offsets + expert, mask=expert <= E, other=0).to(tl.int32)
    stop = tl.load(offsets + expert + 1, mask=expert < E, other=0).to(tl.int32)
    stop = tl.where(expert == E, R, stop)
    count = tl.where(expert <= E, (stop - start + BM - 1) // BM, 0)
    before = tl.sum(tl.where(expert < mine, count, 0), 0)
    tiles_here = tl.sum(tl.where(expert == mine, count, 0), 0)
    first = tl.sum(tl.where(expert == mine, start, 0), 0)
    last = tl.sum(tl.where(expert == mine, stop, 0), 0)
    for step in range(0, tiles_here, BT):  # type: ignore[arg-type]
        j = step + tl.arange(0, BT)
        inside = j < tiles_here
        place = tiles + (before + j) * 3
        tl.store(place, mine + tl.zeros_like(j), mask=inside)
        tl.store(place + 1, first + j * BM, mask=inside)
        tl.store(place + 2, tl.minimum(first + (j + 1) * BM, last), mask=inside)
    if mine == E:
        for step in range(before + tiles_here, bound, BT):  # type: ignore[arg-type]
            j = step + tl.arange(0, BT)
            tl.store(tiles + j * 3, tl.zeros_like(j) - 1, mask=j < bound)


@triton.jit
def locate(tiles, bound, columns: tl.constexpr, GROUP: tl.constexpr):
    """(expert, start, stop, column tile) of this program.

    Programs run through GROUP tiles of rows before the next column, so that the rows and the matrices that run at the
    same time fit the second-level cache together.
    """
    program = tl.program_id(0)
    span = GROUP * columns
    first = (program // span) * GROUP
    size = tl.minimum(bound - first, GROUP)
    row = first + (program % span) % size
    column = (program % span) // size
    expert = tl.load(tiles + row * 3)
    start = tl.load(tiles + row * 3 + 1)
    stop = tl.load(tiles + row * 3 + 2)
    return expert, start, stop, column
