"""Attention whose maps lose entries in training, written out: kernels that drop draw for themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.draws import uniform
from ..core.signals import Signals

__all__ = ["attend", "unit_ids"]


def unit_ids(signals: Signals | None, B: int, S: int, start: int, device: torch.device) -> Tensor:
    """[B*S] int64, the units' numbers; without any in the signals row * 2^32 + place, as models number them."""
    if signals is not None and signals.unit_id is not None:
        return signals.unit_id
    if signals is not None and signals.places is not None:
        return signals.places["unit_id"]
    row = torch.arange(B, device=device)[:, None] << 32
    return (row | torch.arange(start, start + S, device=device)).reshape(-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    share: float,
    seed: Tensor | int,
    unit_id: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """dropout(softmax(scale * q k^T)) v: each entry of the maps is zero with probability `share`, the others divided by
    1 - share.

    Shapes: q [B, H, S, d], k, v [B, G, N, d] with H a multiple of G, unit_id [B*S] int64 of the queries; mask [S, N],
    [B, 1, S, N] or [B, 1, 1, N] bool (True = seen), or what is added to scores, [1 or B, H, S, N] -> [B, H, S, d]. The
    softmax is taken in fp32 (float64 for it). A draw is a hash of seed, query, head and the key's place: the same for a
    unit in any batch and when it is recomputed. Source: Vaswani et al. 2017, as released; Srivastava et al. 2014.
    """
    B, H, S, d = q.shape
    G, N = k.shape[1], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = d**-0.5 if scale is None else scale
    score = (q.reshape(B, G, H // G * S, d) @ k.transpose(2, 3)).to(wide).view(B, H, S, N) * factor
    if mask is not None:
        score = score.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else score + mask
    kept = uniform(seed, unit_id, N * H).view(B, S, N, H).permute(0, 3, 1, 2) >= share
    seen = (torch.softmax(score, dim=-1) * (kept.to(wide) / (1 - share))).to(v.dtype)
    return (seen.view(B, G, H // G * S, N) @ v).view(B, H, S, d)
