"""How far two predictions for the same units are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import UserError

__all__ = ["symmetric_kl"]


def symmetric_kl(first: Tensor, second: Tensor, counted: Tensor | None = None) -> Tensor:
    """[] the sum over counted units of [KL(p||q) + KL(q||p)] / 2 = 1/2 sum_v (p_v - q_v)(log p_v - log q_v), nats.

    Shapes: first, second [..., V] logits of p and q; counted [...] bool or None (False = neither value nor gradient).
    In fp32 (float64 for it) through log_softmax, so that no probability is too small for its logarithm. The gradient
    flows through both. Source: THOR (arXiv 2110.04260); R-Drop (Liang et al. 2021, arXiv 2106.14448).
    Raises `UserError` for logits of different shapes.
    """
    if first.shape != second.shape or (counted is not None and counted.shape != first.shape[:-1]):
        said = "" if counted is None else f" with counted {list(counted.shape)}"
        raise UserError(f"symmetric_kl: logits of shapes {list(first.shape)} and {list(second.shape)}{said}")
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    with torch.autocast(first.device.type, enabled=False):
        both = [t.to(wide) for t in (first, second)]
        if counted is not None:
            both = [t.masked_fill(~counted[..., None], 0) for t in both]
        p, q = (torch.log_softmax(t, dim=-1) for t in both)
        return ((p.exp() - q.exp()) * (p - q)).sum() / 2
