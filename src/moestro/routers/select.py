"""Select steps: which experts each unit takes."""

from __future__ import annotations

from torch import Tensor

from ..core.errors import UserError
from ..core.signals import Signals
from . import config as cfg
from .order import highest
from .steps import Choice, Scores, SelectStep

__all__ = ["TopKSelect", "check_k"]


def check_k(k: int, ids: int, where: str) -> int:
    """k itself, if it lies in 1..ids; else a `UserError`."""
    if not 1 <= k <= ids:
        raise UserError(f"{where}: top_k {k} is not in 1..{ids} (the number of experts); choose a smaller top_k")
    return k


def passing_over(scores: Scores) -> Tensor:
    """[T, E'] what to order by, with everything that is not allowed at the bottom."""
    order = scores.order.detach()
    return order if scores.allowed is None else order.masked_fill(~scores.allowed, float("-inf"))


class TopKSelect(SelectStep):
    """The k highest of each unit, equal ones by lower id. Call-time knob: top_k."""

    def __init__(self, config: cfg.TopK, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.k = check_k(config.k, num_ids, "TopK")
        self.num_ids = num_ids

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        k = check_k(int(signals.knob("top_k", self.k)), self.num_ids, "TopK")
        return Choice(expert=highest(passing_over(scores), k), complete=True)
