"""SparseMixer-v2: experts chosen one after the other, each weighed by a softmax over those that come near the best."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.draws import gumbel, uniform
from ..core.signals import Signals
from . import config as cfg
from .order import highest
from .select import check_k
from .steps import Choice, Scores, SelectStep, WeighStep, unit_ids

__all__ = ["NearBestWeight", "SparseMixerSelect"]


def near_best(logits: Tensor, taken: list[Tensor], epsilon: float) -> Tensor:
    """[T, E'] the logits, -inf for experts in `taken` ([T, 1] each) and for those far behind the best of the rest.

    Expert e falls behind where (best - logit) / max(|logit|, best) > 2 epsilon. At least one is always left.
    """
    left = logits
    for expert in taken:
        left = left.scatter(1, expert.clamp_min(0), float("-inf"))
    best = left.detach().max(dim=1, keepdim=True).values
    behind = (best - logits.detach()) / torch.maximum(logits.detach().abs(), best) > 2 * epsilon
    return left.masked_fill(behind, float("-inf"))


def _logits(scores: Scores) -> Tensor:
    return scores.logits / scores.temperature


class SparseMixerSelect(SelectStep):
    """k different experts one after the other: the best in evaluation; in training one drawn from the softmax over
    those that come near the best of the rest.

    Source: Liu et al. 2024, arXiv 2409.12136 section 2.2 (SparseMixer-v2), and Phi-3.5-MoE's released code.
    Reads the logits, not the probabilities. Call-time knobs: top_k, temperature.
    """

    def __init__(self, config: cfg.SparseMixer, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.top_k = self.k = check_k(config.k, num_ids, "SparseMixer")
        self.epsilon, self.num_ids = config.epsilon, num_ids

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        k = check_k(int(signals.knob("top_k", self.k)), self.num_ids, "SparseMixer")
        logits = _logits(scores).detach()
        if not self.training:
            return Choice(expert=highest(logits, k), complete=True)
        unit = unit_ids(signals, logits)
        taken: list[Tensor] = []
        for i in range(k):
            draw = gumbel(signals.at(f"{i}").seed, unit, self.num_ids, dtype=logits.dtype)
            taken.append(highest(near_best(logits, taken, self.epsilon) + draw, 1))
        return Choice(expert=torch.cat(taken, dim=1), complete=True)


class NearBestWeight(WeighStep):
    """The k-th choice's probability in a softmax over the experts that come near the best of those not chosen before.

    In training the value of a choice that is not the most probable one is cut to a third with probability 3/4, and its
    gradient is not: Heun's third-order estimate of the gradient through the draw (arXiv 2409.12136 eq. 6; 0.3333 in the
    released code).
    """

    draws = True

    def __init__(self, config: cfg.NearBest) -> None:
        super().__init__()
        self.epsilon = config.epsilon

    def forward(self, scores: Scores, expert: Tensor) -> Tensor:
        made = [gates.softmax(dim=1).gather(1, e.clamp_min(0)) for e, gates in self._steps(scores, expert)]
        return torch.where(expert >= 0, torch.cat(made, dim=1), 0.0)

    def drawn(self, scores: Scores, expert: Tensor, signals: Signals) -> Tensor:
        weight = self.forward(scores, expert)
        if not self.training:
            return weight
        with torch.no_grad():
            best = torch.cat([highest(gates, 1) == e for e, gates in self._steps(scores, expert)], dim=1)
            draw = uniform(signals.seed, unit_ids(signals, weight), expert.shape[1], dtype=weight.dtype)
            cut = torch.where(best | (draw > 0.75), 0.0, weight * (2 / 3))
        return weight - cut

    def _steps(self, scores: Scores, expert: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(choice [T, 1], logits of those it was chosen among [T, E']) of every choice in turn."""
        logits, taken = _logits(scores), list(expert.split(1, dim=1))
        for k, e in enumerate(taken):
            yield e, near_best(logits, taken[:k], self.epsilon)
