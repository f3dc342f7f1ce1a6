"""Dropout whose draws are hashes: the same for a unit alone, in any batch, on any rank, and when it is recomputed."""

from __future__ import annotations

from torch import Tensor

from ..core.draws import uniform

__all__ = ["dropout"]


def dropout(x: Tensor, share: float, seed: Tensor | int, unit_id: Tensor) -> Tensor:
    """x with each entry set to zero with probability `share`, the others divided by 1 - share.

    Shapes: x [..., D], unit_id [T] int64 with T the number of its rows. Source: Srivastava et al. 2014, section 4.
    """
    kept = uniform(seed, unit_id, x.shape[-1]) >= share
    return x * (kept.to(x.dtype) / (1 - share)).view(x.shape)
