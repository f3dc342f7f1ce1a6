"""Limit steps: what happens when an expert is chosen too often."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.draws import uniform
from ..core.errors import UserError
from ..core.signals import Signals
from . import config as cfg
from .priority import PriorityStep, Room, serve
from .room import groups_of, share
from .steps import Limited, LimitStep, Scores, unit_ids
from .weigh import chosen

__all__ = ["CapacityLimit", "FixedCapacityLimit", "RandomSecondLimit"]


class CapacityLimit(LimitStep):
    """An expert takes at most max(min_capacity, ceil(factor * K * n / E)) choices, n the valid units (of each segment);
    rounding="down": floor in place of ceil.

    K is the width of the table, E the number of real experts that the router addresses; virtual ids are not limited.
    The `capacity` of the plan is the same with all units, padded or not, in place of n: it depends on shapes only. Per
    segment it is the sum over the segments, read from the data. Call-time knob: capacity_factor.
    """

    def __init__(self, config: cfg.Capacity, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.factor: float | None = config.factor
        self.eval_factor: float | None = config.factor if config.eval_factor is None else config.eval_factor
        self.up = config.rounding == "up"
        self._share_room(config.min_capacity, config, num_experts)

    def _share_room(self, least: int, config: cfg.Capacity | cfg.FixedCapacity, num_experts: int) -> None:
        self.least, self.per, self.num_experts = least, config.per, num_experts
        self.priority: PriorityStep = config.priority.build()
        self.needs = ("segment",) if config.per == "segment" else ()

    def forward(self, expert: Tensor, kept: Tensor | None, scores: Scores, signals: Signals) -> Limited:
        factor = signals.knob("capacity_factor", self.factor if self.training else self.eval_factor)
        T, K = expert.shape
        groups = groups_of(signals, expert, self.per)
        limit, wide = torch.full_like(groups.size, self.least), self.least
        if factor is not None:
            limit = share(float(factor), groups.size * K, self.num_experts, up=self.up).clamp_min(self.least)
            wide: Any = torch.sym_max(share(float(factor), groups.most * K, self.num_experts, up=self.up), self.least)
        most: Any = torch.sym_min(wide, groups.most)  # these are max and min, for numbers that a compiler does not know
        room = Room(groups.of, limit, most, self.num_experts)

        takes_part = (expert >= 0) & (expert < self.num_experts)
        takes_part = takes_part if kept is None else takes_part & kept
        place = serve(room.bucket(expert, takes_part), self.priority.order(expert, scores))
        fits = room.fits(place) | ~takes_part
        kept = fits if kept is None else fits & kept
        capacity: Any = most
        if self.per != "batch":
            capacity = torch.sym_min(T, torch.minimum(limit, groups.size).sum().item())
        moved = self.priority.recycle(expert, kept, takes_part, room, scores, signals.seed)
        if moved is None:
            return Limited(expert, kept, capacity)
        return Limited(*moved, capacity, chosen=expert)


class FixedCapacityLimit(CapacityLimit):
    """An expert takes at most `size` choices (of each segment). Call-time knob: capacity_factor, see `CapacityLimit`,
    with `size` the least room."""

    def __init__(self, config: cfg.FixedCapacity, num_experts: int, num_ids: int) -> None:
        LimitStep.__init__(self)
        self.factor = self.eval_factor = None
        self.up = True
        self._share_room(config.size, config, num_experts)


class RandomSecondLimit(LimitStep):
    """Drops the second choice unless uniform < share / threshold, share = p2 / (p1 + p2) (GShard, arXiv 2006.16668
    algorithm 1 with threshold 0.5: kept with probability 2 g2). Needs exactly two choices per unit."""

    def __init__(self, config: cfg.RandomSecond, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.threshold, self.always = config.threshold, config.when == "always"
        self.then: LimitStep | None = None if config.then is None else config.then.build(num_experts, num_ids)

    def forward(self, expert: Tensor, kept: Tensor | None, scores: Scores, signals: Signals) -> Limited:
        if expert.shape[1] != 2:
            raise UserError(f"RandomSecond needs two choices per unit, not {expert.shape[1]}; use TopK(k=2)")
        kept = torch.ones_like(expert, dtype=torch.bool) if kept is None else kept
        if self.training or self.always:
            first, second = chosen(scores.probs.detach(), expert).unbind(1)
            share = second / (first + second).clamp_min(torch.finfo(first.dtype).tiny)
            draw = uniform(signals.seed, unit_ids(signals, expert), 1, dtype=first.dtype)[:, 0]
            stays = (draw < share / self.threshold) | (expert[:, 1] < 0)
            kept = kept & torch.stack([torch.ones_like(stays), stays], dim=1)
        if self.then is None:
            return Limited(expert, kept)
        return self.then(expert, kept, scores, signals.at("then"))
