"""Attention as an operator on the units."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UserError

__all__ = ["Operator", "mean_map"]

Operator = Callable[[Tensor], Tensor]


def mean_map(kernel: Operator, q: Tensor, k: Tensor) -> Operator:
    """v [B*N, C] -> A v [B*S, C], with A the mean over heads of the attention map that `kernel` applies.

    Shapes: q [B, H, S, d], k [B, G, N', d] with N' <= N keys, those of the last units; kernel [B, G, N', d] ->
    [B, H, S, d].
    """
    B, _, S, d = q.shape
    held = k.shape[2]

    def attend(value: Tensor) -> Tensor:
        if value.ndim != 2 or value.shape[0] % B or value.shape[0] < B * held:
            raise UserError(
                f"attend takes v [B*N, C] with B {B} sequences and N >= {held} units each, not {list(value.shape)}"
            )
        C = value.shape[1]
        v = value.view(B, -1, C)[:, -held:].to(q.dtype)
        # The fast kernels want values as wide as queries.
        v = F.pad(v, (0, -C % d))[:, None].expand(-1, k.shape[1], -1, -1)
        parts = [kernel(part).mean(1) for part in v.split(d, dim=-1)]
        return torch.cat(parts, dim=-1)[..., :C].reshape(B * S, C).to(value.dtype)

    return attend
