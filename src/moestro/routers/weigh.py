"""Weigh steps: with which weight a chosen expert counts. Weights are functions of the table of choices, dropped or not;
the router sets those of absent, padded and dropped choices to 0 afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from . import config as cfg
from .steps import Scores, WeighStep

__all__ = ["ConstantWeight", "RawWeight", "RenormalisedWeight", "SoftmaxKeptWeight", "chosen"]


def chosen(value: Tensor, expert: Tensor, everywhere: bool = False) -> Tensor:
    """[T, K] entries of `value` [T, E'] at the chosen ids, 0 where there is no choice (`everywhere`: there always is).

    Absent choices read column 0 and are masked, so that the backward pass adds zeros only where an index repeats.
    """
    if everywhere:
        return value.gather(1, expert)
    return torch.where(expert >= 0, value.gather(1, expert.clamp_min(0)), 0.0)


def _scaled(weight: Tensor, scale: float) -> Tensor:
    return weight if scale == 1.0 else weight * scale


class RenormalisedWeight(WeighStep):
    """scale * p_k / max(sum of the chosen p + epsilon, floor) (GShard, Mixtral: without either).

    Choices later lost to capacity take part in the sum.
    """

    def __init__(self, config: cfg.Renormalised) -> None:
        super().__init__()
        self.scale, self.epsilon, self.floor = config.scale, config.epsilon, config.floor

    def forward(self, scores: Scores, expert: Tensor) -> Tensor:
        weight = chosen(scores.probs, expert, scores.everywhere)
        total = weight.sum(dim=1, keepdim=True)
        if self.epsilon:
            total = total + self.epsilon
        total = total.clamp_min(max(self.floor, torch.finfo(weight.dtype).tiny))
        return _scaled(weight / total, self.scale)


class RawWeight(WeighStep):
    """scale * p_k (Switch eq. 2; V-MoE)."""

    slots = True

    def __init__(self, config: cfg.Raw) -> None:
        super().__init__()
        self.scale = config.scale

    def forward(self, scores: Scores, expert: Tensor) -> Tensor:
        return _scaled(chosen(scores.probs, expert, scores.everywhere), self.scale)

    def of_slots(self, scores: Scores, unit: Tensor) -> Tensor:
        G, E, C = unit.shape
        flat = unit.transpose(0, 1).reshape(E, G * C)  # groups are disjoint: no unit twice in a row
        return chosen(scores.probs.t(), flat).view(E, G, C).transpose(0, 1) * self.scale


class SoftmaxKeptWeight(WeighStep):
    """scale * softmax over the clean logits / temperature of the chosen experts (Shazeer et al. 2017 eqs. 3-5)."""

    def __init__(self, config: cfg.SoftmaxKept) -> None:
        super().__init__()
        self.scale = config.scale

    def forward(self, scores: Scores, expert: Tensor) -> Tensor:
        logits = chosen(scores.logits, expert, scores.everywhere)
        if isinstance(scores.temperature, Tensor) or scores.temperature != 1.0:
            logits = logits / scores.temperature
        if scores.everywhere:
            return _scaled(logits.softmax(dim=1), self.scale)
        # the lowest finite number, not -inf: a unit without any choice must not become NaN
        weight = logits.masked_fill(expert < 0, torch.finfo(logits.dtype).min).softmax(dim=1)
        return _scaled(torch.where(expert >= 0, weight, 0.0), self.scale)


class ConstantWeight(WeighStep):
    """A constant, or one over the number of the unit's choices. No gradient reaches the router (THOR)."""

    def __init__(self, config: cfg.Constant) -> None:
        super().__init__()
        self.value = config.value
        self.slots = config.value is not None

    def forward(self, scores: Scores, expert: Tensor) -> Tensor:
        made = (expert >= 0).to(scores.probs.dtype)
        if self.value is None:
            return made / made.sum(dim=1, keepdim=True).clamp_min(1.0)
        return made * self.value

    def of_slots(self, scores: Scores, unit: Tensor) -> Tensor:
        assert self.value is not None
        return (unit >= 0).to(scores.probs.dtype) * self.value
