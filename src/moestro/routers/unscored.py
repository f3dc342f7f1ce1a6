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

__all__ = ["GumbelSelect", "LabelSelect", "PartitionSelect", "RandomSelect"]


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
    where both are given, else the segment); or nothing else. Released THOR takes a unit's position for its sequence.
    """

    def __init__(self, config: cfg.Random, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.top_k = self.k = check_k(config.k, num_ids, "Random")
        self.num_ids, self.released = num_ids, config.as_released
        self.level, self.evaluation = config.level, config.evaluation or config.level
        if "sequence" in (self.level, self.evaluation):
            self.needs = ("position",) if self.released else ("segment",)

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        k = check_k(int(signals.knob("top_k", self.k)), self.num_ids, "Random")
        who = self._who(signals, x)
        expert = highest(uniform(signals.seed, who, self.num_ids), k)
        return Choice(expert=expert.expand(x.shape[0], k), complete=True)

    def _who(self, signals: Signals, x: Tensor) -> Tensor:
        level = self.level if self.training else self.evaluation
        if level == "batch":
            return torch.zeros(1, dtype=torch.int64, device=x.device)
        if level == "token":
            return unit_ids(signals, x)
        if self.released:
            assert signals.position is not None
            return signals.position
        if signals.unit_id is not None and signals.position is not None:
            return signals.unit_id - signals.position
        assert signals.segment is not None
        return signals.segment


class PartitionSelect(SelectStep):
    """Random uniform partition (arXiv 2308.06093): a permutation of the batch's units cut into one part per expert.

    Loads differ by one at most: the first T mod E experts take one unit more. Padding takes no place. The order is a
    hash of the seed and of units' numbers, so no unit's content matters; several ranks cut their own units. Evaluation
    has no batch to cut (a token alone must come out as in its sequence): each unit draws by its number then.
    """

    def __init__(self, config: cfg.Partition, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.top_k, self.num_ids = 1, num_ids

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        if not self.training:
            return Choice(expert=highest(uniform(signals.seed, unit_ids(signals, x), self.num_ids), 1), complete=True)
        draw = uniform(signals.seed, unit_ids(signals, x), 1, dtype=torch.float64)[:, 0]
        if scores.valid is not None:
            draw = torch.where(scores.valid, draw, 2.0)  # padding comes last
        order = torch.sort(draw, stable=True).indices
        present = x.shape[0] if scores.valid is None else scores.valid.sum()
        size, larger = present // self.num_ids, present % self.num_ids
        place = torch.arange(x.shape[0], device=x.device)
        rest = larger + (place - larger * (size + 1)) // (size + (size == 0))
        expert = torch.where(place < larger * (size + 1), place // (size + 1), rest).clamp_max(self.num_ids - 1)
        return Choice(expert=torch.empty_like(expert).index_copy(0, order, expert)[:, None], complete=True)


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
