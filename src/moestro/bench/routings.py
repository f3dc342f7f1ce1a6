"""Who goes where, in benchmarks: the same table for every contender."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.errors import UserError, did_you_mean

__all__ = ["ROUTINGS", "routing"]


def _balanced(T: int, E: int, K: int, generator: torch.Generator) -> Tensor:
    """Every expert gets as many tokens as every other, within one where they do not divide."""
    tables = []
    for _ in range(-(-T * K // (E // K * K))):
        tables.append(torch.randperm(E, generator=generator)[: E // K * K].view(-1, K))
    expert = torch.cat(tables)[:T]
    return expert[torch.randperm(T, generator=generator)]


def _zipf(T: int, E: int, K: int, generator: torch.Generator) -> Tensor:
    """The n-th most popular expert is drawn with probability proportional to 1/n; no token draws one twice."""
    popularity = -torch.arange(1, E + 1, dtype=torch.float64).log()
    noise = torch.rand(T, E, dtype=torch.float64, generator=generator).clamp_min(1e-300)
    chosen = (popularity - (-noise.log()).log()).topk(K, dim=1).indices
    return torch.randperm(E, generator=generator)[chosen]


def _idle(T: int, E: int, K: int, generator: torch.Generator) -> Tensor:
    """Half of the experts (K of them at least have work) get nothing, the others are balanced."""
    busy = max(K, E // 2)
    return torch.randperm(E, generator=generator)[_balanced(T, busy, K, generator)]


ROUTINGS: dict[str, Callable[[int, int, int, torch.Generator], Tensor]] = {
    "balanced": _balanced,
    "zipf": _zipf,
    "idle": _idle,
}


def routing(kind: str, tokens: int, experts: int, top_k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A table of choices and its combine weights.

    Shapes: expert [T, K] int64, K distinct ids per token; weight [T, K] fp32, positive, of sum 1.
    Raises `UserError` for an unknown kind, or where there are fewer experts than choices.
    """
    if kind not in ROUTINGS:
        raise UserError(f"unknown routing {kind!r}{did_you_mean(kind, ROUTINGS)}; known: {', '.join(ROUTINGS)}")
    if not 1 <= top_k <= experts:
        raise UserError(f"bench: {top_k} choices among {experts} experts; give 1 to {experts}")
    expert = ROUTINGS[kind](tokens, experts, top_k, generator)
    return expert, torch.randn(tokens, top_k, generator=generator).softmax(1)
