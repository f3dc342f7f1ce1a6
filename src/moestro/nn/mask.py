"""Who sees whom: the mask of attention with padding, packed sequences, windows and a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.signals import Signals

__all__ = ["kernel_mask", "per_row", "visible"]


def visible(
    queries: int,
    keys: int,
    *,
    window: int | None = None,
    valid: Tensor | None = None,
    segment: Tensor | None = None,
    query_segment: Tensor | None = None,
    device: torch.device | None = None,
    causal: bool = True,
) -> Tensor | None:
    """[S, N] or [B, 1, S, N] bool, True where query i may see key j, or None where all see all.

    The S queries are the last S of the N keys. Shapes: valid [B, N] bool; segment [B, N], query_segment [B, S] int64.
    A query that would see nothing (padding) sees itself, so that no row of the softmax is empty. causal=False: queries
    see what comes after them, too, with a window as far as they look back.
    """
    place = torch.arange(keys, device=device)
    own = place[keys - queries :, None]
    mask: Tensor | None = None
    if causal and queries > 1:
        mask = place <= own
    if window is not None and keys > window:
        near = place > own - window if causal else (place - own).abs() < window
        mask = near if mask is None else mask & near
    if valid is None and segment is None:
        return mask
    if mask is None:
        mask = place <= own if causal else torch.ones_like(place == own)
    if valid is not None:
        mask = mask & valid[:, None, None, :]
    if segment is not None and query_segment is not None:
        mask = mask & (segment[:, None, None, :] == query_segment[:, None, :, None])
    return mask | (place == own)


def kernel_mask(
    queries: int,
    keys: int,
    window: int | None,
    valid: Tensor | None,
    segment: Tensor | None,
    query_segment: Tensor | None,
    device: torch.device,
    causal: bool = True,
) -> tuple[Tensor | None, bool]:
    """The mask of attention, as `visible`, and whether a kernel's own causal path says the same without one.

    Shapes: valid [B, N] bool; segment [B, N], query_segment [B, S] int64, by default that of the last S keys.
    """
    plain = valid is None and segment is None
    if plain and (queries == 1 or (not causal and (window is None or keys <= window))):
        return None, False
    if plain and queries == keys and (window is None or keys <= window):
        return None, True
    if segment is not None and query_segment is None:
        query_segment = segment[:, keys - queries :]
    mask = visible(
        queries,
        keys,
        window=window,
        valid=valid,
        segment=segment,
        query_segment=query_segment,
        device=device,
        causal=causal,
    )
    return mask, False


def per_row(signals: Signals | None, B: int, S: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """valid, position and segment as [B, S]. Raises `UserError` for signals of another length."""
    if signals is None or (signals.valid is None and signals.position is None and signals.segment is None):
        return None, None, None
    out: list[Tensor | None] = []
    for name in ("valid", "position", "segment"):
        tensor: Tensor | None = getattr(signals, name)
        if tensor is not None and tensor.numel() != B * S:
            raise UserError(
                f"Signals.{name} has {tensor.numel()} entries for {B} x {S} tokens; it is flat, one per token"
            )
        out.append(None if tensor is None else tensor.view(B, S))
    return out[0], out[1], out[2]
