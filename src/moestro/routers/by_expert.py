"""Expert choice: experts take units."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.signals import Signals
from . import config as cfg
from .order import descending, highest
from .room import Groups, groups_of, share
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
        order = scores.order.detach().t().contiguous()  # [E, T]
        if self.per == "batch":
            width, takes = _takes(groups_of(signals, x, "batch"), factor, self.num_experts)
            order = order if scores.valid is None else order.masked_fill(~scores.valid, float("-inf"))
            taken = torch.arange(width, device=x.device) < takes
            return Choice(unit=torch.where(taken, highest(order, width), -1)[None])
        assert signals.segment is not None
        return Choice(unit=torch.ops.moestro.choice_of_segments(order, signals.segment, scores.valid, factor))


def _takes(groups: Groups, factor: float, num_experts: int) -> tuple[int, Tensor]:
    """(the most units that an expert takes of a group, how many it takes of each [G])."""
    width = min(max(share(factor, groups.most, num_experts, up=False), 1), groups.most)
    return width, torch.minimum(share(factor, groups.size, num_experts, up=False).clamp_min(1), groups.size)


_LIBRARY = torch.library.Library("moestro", "FRAGMENT")
_LIBRARY.define("choice_of_segments(Tensor order, Tensor segment, Tensor? valid, float factor) -> Tensor unit")


def _of_segments(order: Tensor, segment: Tensor, valid: Tensor | None, factor: float) -> Tensor:
    """unit [G, E, C] of order [E, T], group by group. An op, because G and C are read from the data."""
    E, T = order.shape
    groups = groups_of(Signals(segment=segment, valid=valid), segment, "segment")
    G = groups.count
    width, takes = _takes(groups, factor, E)
    # per expert: by group, inside by probability, inside by unit; padding in a group of its own behind all others
    of = groups.of if valid is None else torch.where(valid, groups.of, G)
    by_prob = descending(order)
    behind = torch.sort(of[by_prob], dim=1, stable=True)
    unit, group = by_prob.gather(1, behind.indices), behind.values
    start = groups.size.cumsum(0) - groups.size
    pad = lambda t: torch.cat([t, t.new_zeros(1)])  # noqa: E731  # group G takes nobody
    place = torch.arange(T, device=order.device) - pad(start)[group]
    taken = place < pad(takes)[group]

    # everybody not taken writes to a spare last slot
    slot = torch.where(taken, group * width + place, G * width)
    table = torch.full((E, G * width + 1), -1, dtype=torch.int64, device=order.device)
    table = table.scatter(1, slot, torch.where(taken, unit, -1))[:, : G * width]
    return table.view(E, G, width).transpose(0, 1).contiguous()


_LIBRARY.impl("choice_of_segments", _of_segments, "CompositeExplicitAutograd")


@torch.library.register_fake("moestro::choice_of_segments")
def _(order: Tensor, segment: Tensor, valid: Tensor | None, factor: float) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size
    return order.new_empty((size(min=1), order.shape[0], size()), dtype=torch.int64)
