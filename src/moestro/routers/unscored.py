"""Select steps that draw, or that are told."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.draws import gumbel, uniform
from ..core.errors import UserError
from ..core.signals import Signals
from . import config as cfg
from .order import highest
from .select import check_k, passing_over
from .steps import Choice, Scores, SelectStep, unit_ids

__all__ = ["GumbelSelect", "LabelSelect", "RandomSelect"]


class LabelSelect(SelectStep):
    """expert = the signal, one per unit; -1 = none. Raises `UserError` for numbers that are no expert."""

    def __init__(self, config: cfg.Label, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.signal, self.num_ids = config.signal, num_ids
        self.needs = (config.signal,)

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        expert: Tensor = getattr(signals, self.signal)
        if torch.compiler.is_compiling():  # no branch on values there, and no error of ours
            inside = (expert >= -1) & (expert < self.num_ids)
            torch._assert_async(
                inside.all(), f"signals.{self.signal} names an expert that is not in -1..{self.num_ids - 1}"
            )
        elif expert.numel() and not expert.is_meta and (int(expert.min()) < -1 or int(expert.max()) >= self.num_ids):
            raise UserError(
                f"signals.{self.signal} names experts {int(expert.min())}..{int(expert.max())}, "
                f"but there are 0..{self.num_ids - 1} (-1 for none)"
            )
        return Choice(expert=expert.to(torch.int64)[:, None])


class RandomSelect(SelectStep):
    """k different experts per draw, uniformly (THOR, arXiv 2110.04260). Call-time knob: top_k.

    A draw is a hash of the seed and of: the unit's number; the number of its sequence's first unit (unit_id - position
    where both are given, else the segment); or nothing else.
    """

    def __init__(self, config: cfg.Random, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.top_k = self.k = check_k(config.k, num_ids, "Random")
        self.level, self.num_ids = config.level, num_ids
        self.needs = ("segment",) if config.level == "sequence" else ()

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        k = check_k(int(signals.knob("top_k", self.k)), self.num_ids, "Random")
        who = self._who(signals, x)
        expert = highest(uniform(signals.seed, who, self.num_ids), k)
        return Choice(expert=expert.expand(x.shape[0], k), complete=True)

    def _who(self, signals: Signals, x: Tensor) -> Tensor:
        if self.level == "batch":
            return torch.zeros(1, dtype=torch.int64, device=x.device)
        if self.level == "token":
            return unit_ids(signals, x)
        if signals.unit_id is not None and signals.position is not None:
            return signals.unit_id - signals.position
        assert signals.segment is not None
        return signals.segment


class GumbelSelect(SelectStep):
    """The k highest of log p + Gumbel noise: k draws without replacement from p (Kool et al., arXiv 1903.06059).

    With softmax probabilities log p is logits / temperature up to a constant per unit. Call-time knob: top_k.
    """

    masks = True

    def __init__(self, config: cfg.Gumbel, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.top_k = self.k = check_k(config.k, num_ids, "Gumbel")
        self.num_ids, self.always = num_ids, config.when == "always"

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        k = check_k(int(signals.knob("top_k", self.k)), self.num_ids, "Gumbel")
        order = scores.order.detach()
        if self.training or self.always:
            draw = gumbel(signals.seed, unit_ids(signals, order), self.num_ids, dtype=order.dtype)
            order = order.log() + draw
        return Choice(expert=highest(passing_over(order, scores), k), complete=True)
