"""Weigh steps: with which weight a chosen expert counts. Weights are functions of the table of choices, dropped or not;
the router sets those of absent, padded and dropped choices to 0 afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from . import config as cfg
from .steps import Scores, WeighStep

__all__ = ["RenormalisedWeight", "chosen"]


def chosen(value: Tensor, expert: Tensor) -> Tensor:
    """[T, K] entries of `value` [T, E'] at the chosen ids, 0 where there is no choice.

    Absent choices read column 0 and are masked, so that the backward pass adds zeros only where an index repeats.
    """
    return torch.where(expert >= 0, value.gather(1, expert.clamp_min(0)), 0.0)


class RenormalisedWeight(WeighStep):
    """scale * p_k / sum of the chosen p (GShard, Mixtral). Choices later lost to capacity take part in the sum."""

    def __init__(self, config: cfg.Renormalised) -> None:
        super().__init__()
        self.scale = config.scale

    def forward(self, scores: Scores, expert: Tensor) -> Tensor:
        weight = chosen(scores.probs, expert)
        total = weight.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        return weight / total * self.scale
