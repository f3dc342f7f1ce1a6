"""Select steps that order the experts of a unit by probability, and the one that takes all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import UserError
from ..core.signals import Signals
from . import config as cfg
from .order import descending, highest
from .steps import Choice, Scores, SelectStep

__all__ = ["AllSelect", "TopKSelect", "TopPSelect", "check_k", "passing_over"]


def check_k(k: int, ids: int, where: str) -> int:
    """k itself, if it lies in 1..ids; else a `UserError`."""
    if not 1 <= k <= ids:
        raise UserError(f"{where}: top_k {k} is not in 1..{ids} (the number of experts); choose a smaller top_k")
    return k


def passing_over(order: Tensor, scores: Scores) -> Tensor:
    """[T, E'] `order` without a graph, with everything that is not allowed at the bottom."""
    order = order.detach()
    return order if scores.allowed is None else order.masked_fill(~scores.allowed, float("-inf"))


class TopKSelect(SelectStep):
    """The k highest of each unit, equal ones by lower id. Call-time knob: top_k."""

    masks = True
    by_order = True

    def __init__(self, config: cfg.TopK, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.top_k = self.k = check_k(config.k, num_ids, "TopK")
        self.num_ids = num_ids

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        k = check_k(int(signals.knob("top_k", self.k)), self.num_ids, "TopK")
        return Choice(expert=highest(passing_over(scores.order, scores), k), complete=True)


class TopPSelect(SelectStep):
    """The fewest experts whose probabilities sum to more than p, highest first, -1 behind them; at most max_k.

    t = min {k: p_1 + ... + p_k > p}, strictly greater (arXiv 2403.07652 eqs. 4-5). Call-time knob: top_p.
    As released, probabilities and their sums are rounded to bfloat16, and p with them.
    """

    masks = True
    ragged = True

    def __init__(self, config: cfg.TopP, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.p, self.as_released, self.expected = config.p, config.as_released, config.expected
        self.top_k = self.max_k = check_k(num_ids if config.max_k is None else config.max_k, num_ids, "TopP")

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        p = signals.knob("top_p", self.p)
        order = passing_over(self._released(scores) if self.as_released else scores.order, scores)
        wide = self.max_k == order.shape[1]
        expert = descending(order) if wide else highest(order.float() if self.as_released else order, self.max_k)
        mass = order.gather(1, expert)
        before = F.pad(mass[:, :-1].cumsum(dim=1), (1, 0))  # the sum of those ahead has not passed p yet
        return Choice(expert=torch.where((before <= p) & (mass > float("-inf")), expert, -1))

    def _released(self, scores: Scores) -> Tensor:
        """[T, E'] bfloat16: the softmax of rounded logits; of noisy ones, the rounded distribution."""
        if scores.rank is not None:
            return scores.rank.detach().bfloat16()
        return (scores.logits / scores.temperature).detach().bfloat16().softmax(dim=1)


class AllSelect(SelectStep):
    """Every expert, on every unit: a `Dense` plan."""

    makes = "Dense"

    def __init__(self, config: cfg.All, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.top_k = num_experts

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        return Choice()
