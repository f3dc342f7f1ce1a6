"""T5's relative position bias."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.params import ParamInfo
from .config import RelativeBias as RelativeBiasConfig
from .mask import visible

__all__ = ["RelativeBias", "bucket", "joined"]


def bucket(distance: Tensor, buckets: int, max_distance: int, causal: bool) -> Tensor:
    """The bucket of each distance, key place less query place, int64.

    Causal attention has one half of numbers for what lies behind: the nearer half of the buckets hold one distance
    each, the others widths that grow like a logarithm up to `max_distance`. In both directions each side has half of
    the buckets, what lies ahead the upper half. Source: Raffel et al. 2020, section 2.1, with the bounds of the
    released models.
    """
    ahead = torch.zeros_like(distance)
    if causal:
        away = (-distance).clamp_min(0)
    else:
        buckets //= 2
        ahead = (distance > 0).to(torch.int64) * buckets
        away = distance.abs()
    exact = buckets // 2
    # In fp32 and in this order: the bounds of the logarithmic buckets depend on it.
    grown = torch.log(away.clamp_min(1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    far = (exact + grown.to(torch.int64)).clamp_max(buckets - 1)
    return ahead + torch.where(away < exact, away, far)


class RelativeBias(nn.Module):
    """`(queries, keys) -> [1, H, S, N]`, to be added to the scores of the last S = queries of N = keys tokens.

    Distances are those of places in the row, so padding before a sequence and packed sequences change nothing.
    Parameter: table [buckets, H].
    """

    def __init__(self, config: RelativeBiasConfig, num_heads: int, causal: bool = True) -> None:
        super().__init__()
        self.config, self.one_sided = config, causal
        self.table = nn.Parameter(torch.empty(config.buckets, num_heads))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, queries: int, keys: int) -> Tensor:
        # One entry per distance 1 - N .. S - 1; the row of query i is the window of N entries that begins at S - 1 - i.
        distance = torch.arange(1 - keys, queries, device=self.table.device)
        c = self.config
        line = F.embedding(bucket(distance, c.buckets, c.max_distance, self.one_sided), self.table)
        return line.t().unfold(1, keys, 1).flip(1)[None]

    def param_info(self) -> dict[str, ParamInfo]:
        return {"table": ParamInfo(role="attention", decay=False)}


def joined(bias: Tensor, mask: Tensor | None, causal: bool, keys: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores [B, H, S, N]: of a bias [1, H, S, N'] the part of the last N = keys keys, and minus
    infinity where the mask, or the kernel's own causal path, would show nothing."""
    scores = bias[..., -keys:].to(dtype)
    if causal:
        mask = visible(scores.shape[2], keys, device=bias.device)
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))
