"""One token from logits: greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.draws import fold, uniform
from ..core.errors import UserError

__all__ = ["choose", "distribution"]


def distribution(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None) -> Tensor:
    """The probabilities that tokens are drawn from, float64.

    Shapes: logits [B, V] -> [B, V]. softmax(logits / temperature), cut to the top_k most probable tokens, renormalised,
    cut to the fewest of them that hold at least top_p (Holtzman et al. 2020), renormalised. Ties: the lower id.
    """
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    if top_k is None and top_p >= 1:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = 0
        ordered = ordered / ordered.sum(-1, keepdim=True)
    if top_p < 1:
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0)
        ordered = ordered / ordered.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, ordered)


def choose(
    logits: Tensor,
    seed: Tensor,
    position: Tensor,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """[B] int64, the next token of each row. temperature 0 = the most probable one, ties to the lower id.

    Shapes: logits [B, V]; seed, position [B] int64. The draw of a row is a hash of its seed and position.
    Raises `UserError` for settings outside their range.
    """
    if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise UserError(
            f"sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 1, not {temperature}, {top_p} and {top_k}"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)  # of several highest the first
    probs = distribution(logits, temperature, top_p, top_k)
    draws = torch.empty(len(probs), 1, dtype=torch.float64, device=logits.device)
    for s in dict.fromkeys(seed.tolist()):
        mine = seed == s
        draws[mine] = uniform(fold(s, "sample"), position[mine], 1, dtype=torch.float64)
    reached = probs.cumsum(-1)
    target = draws * reached[:, -1:]
    return torch.searchsorted(reached, target.contiguous(), right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
