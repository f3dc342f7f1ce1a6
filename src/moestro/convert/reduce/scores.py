"""What an expert is worth, and how alike two are, on given text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.plan import Plan, load
from ...moe.layer import MoELayer
from ...ops.combine import gather_rows
from ...ops.rows import rows as derive_rows
from ...trace.diversity import cosines
from ..change.conduct import Seen, weight_of
from .parts import Parts

__all__ = ["loads", "output_similarity", "weight_similarity", "weighted_norms"]

MOST = 1024  # units on which outputs of all experts are compared


def loads(seen: Sequence[Seen], num_experts: int) -> Tensor:
    """[E] int64: how many units each expert met."""
    return sum((load(s.plan).cpu() for s in seen), torch.zeros(num_experts, dtype=torch.int64))


@torch.no_grad()
def weighted_norms(layer: MoELayer, seen: Sequence[Seen]) -> Tensor:
    """[E] float64: mean over the units that chose an expert of weight * |expert(x)| (REAP, arXiv 2510.13999 eq. 9); 0
    for an expert that no unit chose."""
    E = layer.config.num_experts
    total, count = torch.zeros(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for s in seen:
        index = derive_rows(s.plan)
        norm = layer.experts(gather_rows(s.x, index), index).flatten(1).double().norm(dim=1)
        weight = torch.stack([weight_of(s.plan, e) for e in range(E)], 1).double()
        total.index_add_(0, index.expert.cpu(), (norm * weight[index.unit, index.expert]).cpu())
        count += index.offsets.diff().cpu()
    return total / count.clamp_min(1)


@torch.no_grad()
def output_similarity(layer: MoELayer, seen: Sequence[Seen]) -> Tensor:
    """[E, E] float64: cosine of the outputs of two experts, both run on the same units (the first 1024)."""
    E = layer.config.num_experts
    x = torch.cat([s.x for s in seen])[:MOST]
    every = torch.arange(E, device=x.device).expand(x.shape[0], E)
    plan = Plan(expert=every, weight=torch.ones(x.shape[0], E, device=x.device), num_experts=E, complete=True)
    index = derive_rows(plan)
    return cosines(layer.experts(gather_rows(x, index), index).reshape(E, -1))


def weight_similarity(parts: Parts) -> Tensor:
    """[E, E] float64: cosine of two experts' weights, entry by entry: neurons are not matched. Unlike shapes: -1."""
    flat = [torch.cat([t.reshape(-1) for _, t in sorted(e.items())]) for e in parts.experts]
    out = torch.full((len(flat), len(flat)), -1.0, dtype=torch.float64)
    for i, a in enumerate(flat):
        for j, b in enumerate(flat):
            if a.shape == b.shape:
                out[i, j] = cosines([a, b])[0, 1] if i != j else 1.0
    return out
