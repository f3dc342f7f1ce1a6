"""Cross-entropy over all logits at once, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cross_entropy"]


def cross_entropy(
    h: Tensor, head: Tensor, target: Tensor, valid: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sum of nats [], count [] int64) of the targets that are not -1 and valid."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for t in range(h.shape[0]):
        if int(target[t]) < 0 or (valid is not None and not bool(valid[t])):
            continue
        logits = head.double() @ h[t].double()
        logits = logits if bias is None else logits + bias.double()
        total = total + torch.logsumexp(logits, 0) - logits[int(target[t])]
        count += 1
    return total, torch.tensor(count)
