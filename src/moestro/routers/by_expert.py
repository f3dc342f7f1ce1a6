"""Expert choice: experts take units."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.signals import Signals
from . import config as cfg
from .order import descending, highest
from .room import groups_of, share
from .steps import Choice, Scores, SelectStep

__all__ = ["ExpertChoiceSelection"]


class ExpertChoiceSelection(SelectStep):
    """Each expert takes the floor(f * n / E) valid units of highest probability (at least 1) of each group of n.

    Equal probabilities go to the lower unit. Source: Zhou et al., arXiv 2202.09368 sec. 3; per image as in ProMoE.
    The table is wide enough for the batch without padding; slots that padding leaves over are -1. Not causal: whether a
    unit is taken depends on all others. Per segment, the number of groups is read from the data.
    Call-time knob: capacity_factor.
    """

    makes = "ExpertChoice"
    causal = False

    def __init__(self, config: cfg.ExpertChoiceSelect, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.factor, self.per, self.num_experts = config.capacity_factor, config.per, num_experts
        self.top_k = min(config.capacity_factor, num_experts)
        self.needs = ("segment",) if config.per == "segment" else ()

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        factor = float(signals.knob("capacity_factor", self.factor))
        groups = groups_of(signals, x, self.per)
        E, T, G = self.num_experts, x.shape[0], groups.count
        width = min(max(share(factor, groups.most, E, up=False), 1), groups.most)
        takes = torch.minimum(share(factor, groups.size, E, up=False).clamp_min(1), groups.size)
        order = scores.order.detach().t().contiguous()  # [E, T]
        if self.per == "batch":
            order = order if scores.valid is None else order.masked_fill(~scores.valid, float("-inf"))
            taken = torch.arange(width, device=x.device) < takes
            return Choice(unit=torch.where(taken, highest(order, width), -1)[None])

        # per expert: by group, inside by probability, inside by unit; padding in a group of its own behind all others
        of = groups.of if scores.valid is None else torch.where(scores.valid, groups.of, G)
        by_prob = descending(order)
        behind = torch.sort(of[by_prob], dim=1, stable=True)
        unit, group = by_prob.gather(1, behind.indices), behind.values
        start = groups.size.cumsum(0) - groups.size
        pad = lambda t: torch.cat([t, t.new_zeros(1)])  # noqa: E731  # group G takes nobody
        place = torch.arange(T, device=x.device) - pad(start)[group]
        taken = place < pad(takes)[group]

        # everybody not taken writes to a spare last slot
        slot = torch.where(taken, group * width + place, G * width)
        table = torch.full((E, G * width + 1), -1, dtype=torch.int64, device=x.device)
        table = table.scatter(1, slot, torch.where(taken, unit, -1))[:, : G * width]
        return Choice(unit=table.view(E, G, width).transpose(0, 1).contiguous())
