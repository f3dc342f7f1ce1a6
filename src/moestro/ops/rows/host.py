"""The rows of a table of choices on the CPU, in numpy.

numpy's stable sort of 8- and 16-bit keys is a radix sort: 15 us for 8192 choices where torch.sort takes 60 to 200 us,
and the whole index takes a quarter of the time of the same steps in torch (0.05 ms for 8192 choices, 0.5 ms for 100k).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...core.errors import UserError

__all__ = ["choices"]


def choices(
    expert: Tensor, kept: Tensor | None, valid: Tensor | None, num_experts: int, complete: bool
) -> tuple[Tensor, ...]:
    """(unit, slot, expert, offsets, inverse, source) as `rows_of_choices` returns them."""
    T, K = expert.shape
    table = expert.numpy().reshape(-1)
    key = table.astype(np.uint8 if num_experts < 2**8 else np.uint16 if num_experts < 2**16 else np.int64)
    if complete:
        R = T * K
        source = np.argsort(key, kind="stable")
        inverse = np.empty(R, np.int64)
    else:
        rows = (table >= 0) & (table < num_experts)
        if kept is not None:
            rows &= kept.numpy().reshape(-1)
        if valid is not None:
            rows &= np.repeat(valid.numpy(), K)
        key[~rows] = num_experts  # sorts behind all experts
        R = int(np.count_nonzero(rows))
        source = np.argsort(key, kind="stable")[:R].copy()
        inverse = np.full(T * K, -1, np.int64)
    inverse[source] = np.arange(R)
    counts = np.bincount(key[source], minlength=num_experts)
    if counts.size > num_experts:
        raise UserError("bad plan: it promises `complete`, but some choices are absent or virtual; see Plan.check()")
    offsets = np.zeros(num_experts + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    unit = source // max(K, 1)
    arrays = (
        unit,
        source - unit * K,
        np.repeat(np.arange(num_experts), counts),
        offsets,
        inverse.reshape(T, K),
        source,
    )
    return tuple(torch.from_numpy(a) for a in arrays)
