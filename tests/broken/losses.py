"""Failure 1: a balance loss that is constant, out of the graph, averaged per part, or pooled over layers."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.core.plan import Plan, demand
from moestro.core.stats import Stats


class Constant:
    """Counts times counts: no probability enters, so nothing can be learned from it."""

    name, coefficient, needs = "constant", 0.01, ()

    def stats(self, plan: Plan, **tensors: Tensor) -> Stats:
        return Stats({"count": demand(plan), "probs": demand(plan).double()})

    def value(self, stats: Stats) -> Tensor:
        share = stats["count"] / stats["count"].sum()
        return share.numel() * (share * stats["probs"] / stats["probs"].sum()).sum()

    def __call__(self, source, **tensors):
        return self.value(source if isinstance(source, Stats) else self.stats(source, **tensors))


class Detached(Constant):
    """The right value, cut from the graph."""

    name = "detached"

    def stats(self, plan: Plan, **tensors: Tensor) -> Stats:
        assert plan.probs is not None
        mask = plan.valid if plan.valid is not None else torch.ones(plan.probs.shape[0], dtype=torch.bool)
        return Stats({"count": demand(plan), "probs": (plan.probs.detach() * mask[:, None]).sum(0)})


class SeesPadding(Constant):
    """Probabilities averaged over all positions, padding included."""

    name = "sees padding"

    def stats(self, plan: Plan, **tensors: Tensor) -> Stats:
        assert plan.probs is not None
        return Stats({"count": demand(plan), "probs": plan.probs.sum(0)})


class MeanOfParts(Constant):
    """The loss of each micro-batch, averaged: not the loss of the batch."""

    name = "mean of parts"

    def stats(self, plan: Plan, **tensors: Tensor) -> Stats:
        assert plan.probs is not None
        mask = plan.valid if plan.valid is not None else torch.ones(plan.probs.shape[0], dtype=torch.bool)
        probs = (plan.probs * mask[:, None]).sum(0)
        share = demand(plan) / demand(plan).sum()
        value = share.numel() * (share * probs / probs.sum()).sum()
        return Stats({"value": value, "parts": torch.tensor(1)})

    def value(self, stats: Stats) -> Tensor:
        return stats["value"] / stats["parts"]


def pooled_over_layers(plans: list[Plan]) -> Tensor:
    """All layers concatenated before counts and probabilities are multiplied: opposite collapses cancel."""
    probs = torch.cat([p.probs for p in plans if p.probs is not None])
    counts = sum(demand(p) for p in plans)
    assert isinstance(counts, Tensor)
    return probs.shape[1] * (counts / counts.sum() * probs.mean(0)).sum() * len(plans)
