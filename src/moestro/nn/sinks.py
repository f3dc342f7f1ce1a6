"""Attention whose softmax has one more logit per head, which looks at nothing (GPT-OSS's attention sinks)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "attend_one", "widened"]


def widened(width: int) -> int:
    """How wide heads are for the kernel: one more entry for the sink, and a multiple of 8, as fast kernels want."""
    return width // 8 * 8 + 8


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """y[i] = sum over j of exp(s[i, j]) v[j] / (exp(sink) + sum over j of exp(s[i, j])), s = scale * q k^T.

    Shapes: q [B, H, S, d], k, v [B, G, N, d] with H a multiple of G, sinks [H], mask [S, N] or [B, 1, S, N] bool
    (True = seen) or None -> [B, H, S, d]. causal: N = S and query i sees keys up to i.

    Exact, in one call of torch's fused kernel: a first key of zero value meets a further entry of the queries, which
    makes its score the sink. Under the kernel's own causal rule, where query i sees the first i + 1 keys, a first query
    that nobody reads keeps the others in step. Source: Agarwal et al. 2025 (arXiv 2508.10925), section 2.2.
    """
    B, H, S, d = q.shape
    more = widened(d) - d
    sink = (sinks / scale).to(q.dtype).view(1, H, 1, 1).expand(B, H, S, 1)
    q = torch.cat((q, F.pad(sink, (0, more - 1))), dim=-1)
    first = F.pad(k.new_ones(1), (d, more - 1))
    k = torch.cat((first.expand(*k.shape[:2], 1, -1), F.pad(k, (0, more))), dim=2)
    v = F.pad(v, (0, more, 1, 0))
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True)
    if causal:
        q = F.pad(q, (0, 0, 1, 0))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != H
    )
    return y[:, :, 1 if causal else 0 :, :d]


def attend_one(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float) -> Tensor:
    """`attend` of one query that sees all keys, written out, so that a cache is read and never copied.

    Shapes: q [B, H, 1, d], k, v [B, G, N, d], sinks [H] -> [B, H, 1, d]. The softmax is taken in fp32 (float64 for it).
    """
    B, H, _, d = q.shape
    G = k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    score = (q.reshape(B, G, H // G, d) @ k.transpose(2, 3)).to(wide) * scale  # [B, G, H / G, N]
    score = torch.cat((score, sinks.to(wide).view(1, G, H // G, 1).expand(B, -1, -1, 1)), dim=-1)
    seen = torch.softmax(score, dim=-1)[..., :-1].to(v.dtype)
    return (seen @ v).view(B, H, 1, d)
