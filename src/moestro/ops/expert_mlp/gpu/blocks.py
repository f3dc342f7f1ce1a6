"""Block sizes of the kernels, by rule from the dtype, the GPU and the shape; never by stopwatch.

The table is made from what fits (registers, shared memory; the tests compile every entry), not from measurements.
"""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["Block", "Blocks", "blocks"]

GROUP = 8  # tiles of rows that go through the same columns together


@dataclasses.dataclass(frozen=True)
class Block:
    """rows x cols outputs per program, depth inputs at a time; warps; stages of loads in flight."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Of the first product, of plain products, of the gradient of hidden values, and of the gradients of matrices.

    The first three have the same number of rows: one table of tiles serves them all.
    """

    first: Block
    product: Block
    hidden: Block
    outer: Block


# Shared memory per block: 227 KiB from 9.0 on (not 12.x), 163 KiB on 8.0 and 8.7, 99 KiB on 8.6, 8.9 and 12.x.
_TABLE: dict[str, Blocks] = {
    "large": Blocks(
        first=Block(128, 128, 64, 8, 4),
        product=Block(128, 256, 64, 8, 4),
        hidden=Block(128, 128, 64, 8, 4),
        outer=Block(128, 256, 64, 8, 4),
    ),
    "medium": Blocks(
        first=Block(128, 64, 64, 8, 4),
        product=Block(128, 128, 64, 8, 4),
        hidden=Block(128, 128, 64, 8, 4),
        outer=Block(128, 128, 64, 8, 4),
    ),
    "small": Blocks(
        first=Block(64, 64, 64, 4, 3),
        product=Block(64, 128, 64, 4, 3),
        hidden=Block(64, 64, 64, 4, 3),
        outer=Block(128, 64, 64, 4, 3),
    ),
    # Rows that start anywhere are loaded value by value: many places in registers.
    "unaligned": Blocks(
        first=Block(64, 64, 32, 8, 3),
        product=Block(64, 64, 32, 4, 3),
        hidden=Block(64, 64, 32, 8, 3),
        outer=Block(64, 64, 32, 4, 3),
    ),
    "float32": Blocks(
        first=Block(32, 32, 32, 4, 2),
        product=Block(32, 64, 32, 4, 2),
        hidden=Block(32, 32, 32, 4, 2),
        outer=Block(32, 64, 16, 4, 2),
    ),
}


def blocks(
    capability: tuple[int, int], dtype: torch.dtype, dim: int, width: int, rows_per_expert: float | None = None
) -> Blocks:
    """The block sizes for D = dim and F = width.

    rows_per_expert: the mean. Experts with few rows get short tiles; None keeps the tile whatever the rows, so that no
    row's result depends on how many others there are.
    """
    if dtype == torch.float32:
        size = "float32"
    elif dim % 8 or width % 8:
        size = "unaligned"
    elif capability[0] in (9, 10):
        size = "large"
    elif capability in ((8, 0), (8, 7)):
        size = "medium"
    else:
        size = "small"
    found = _TABLE[size]
    tall = found.first.rows
    if rows_per_expert is not None:
        tall = min(tall, max(16, _power(int(rows_per_expert) + 1)))
    return Blocks(
        first=_fit(found.first, tall, width, dim),
        product=_fit(found.product, tall, max(dim, width), max(dim, width)),
        hidden=_fit(found.hidden, tall, width, dim),
        outer=_fit(found.outer, found.outer.rows, max(dim, width), found.outer.depth),
    )


def _fit(block: Block, rows: int, cols: int, depth: int) -> Block:
    """The block, no larger than what there is to do; no more warps than 512 outputs each give work to."""
    cols, depth = min(block.cols, _power(cols)), min(block.depth, _power(depth))
    warps = min(block.warps, max(4, rows * cols // 512))
    return dataclasses.replace(block, rows=rows, cols=cols, depth=depth, warps=warps)


def _power(n: int) -> int:
    """The next power of two, at least 16: what a product of blocks takes."""
    return max(16, 1 << max(n - 1, 0).bit_length())
