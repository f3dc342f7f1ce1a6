"""Who sees whom: the mask of causal attention with padding, packed sequences, windows and a cache."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["visible"]


def visible(
    queries: int,
    keys: int,
    *,
    window: int | None = None,
    valid: Tensor | None = None,
    segment: Tensor | None = None,
    query_segment: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """[S, N] or [B, 1, S, N] bool, True where query i may see key j, or None where all see all.

    The S queries are the last S of the N keys. Shapes: valid [B, N] bool; segment [B, N], query_segment [B, S] int64.
    A query that would see nothing (padding) sees itself, so that no row of the softmax is empty.
    """
    place = torch.arange(keys, device=device)
    own = place[keys - queries :, None]
    mask: Tensor | None = None
    if queries > 1:
        mask = place <= own
    if window is not None and keys > window:
        near = place > own - window
        mask = near if mask is None else mask & near
    if valid is None and segment is None:
        return mask
    if mask is None:
        mask = place <= own
    if valid is not None:
        mask = mask & valid[:, None, None, :]
    if segment is not None and query_segment is not None:
        mask = mask & (segment[:, None, None, :] == query_segment[:, None, :, None])
    return mask | (place == own)
