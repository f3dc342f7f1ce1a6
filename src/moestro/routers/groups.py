"""Selection inside the best groups of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.pytree import changed
from ..core.signals import Signals
from . import config as cfg
from .order import highest
from .steps import Choice, Scores, SelectStep

__all__ = ["GroupLimitedSelect"]


class GroupLimitedSelect(SelectStep):
    """A unit may choose from the experts of its best `kept` groups; equal groups go to the lower one.

    A group is worth its highest entry (DeepSeek-V2, arXiv 2405.04434 sec. 2.2.2) or the sum of its two highest
    (DeepSeek-V3, arXiv 2412.19437 sec. 2.1.2), bias included where there is one. Experts outside are passed over
    whatever their sign; released code gives them 0, which beats a negative biased score.
    """

    def __init__(self, config: cfg.GroupLimited, num_experts: int, num_ids: int) -> None:
        super().__init__()
        if num_ids != num_experts:
            raise UserError("GroupLimited: virtual ids belong to no group; leave Router.virtual empty")
        if num_experts % config.groups:
            raise UserError(f"GroupLimited: {num_experts} experts do not divide into {config.groups} equal groups")
        self.groups, self.kept = config.groups, config.kept
        self.size = num_experts // config.groups
        self.best = 1 if config.by == "max" else min(2, self.size)
        self.inner: SelectStep = config.inner.build(num_experts, num_ids)
        if not self.inner.masks:
            raise UserError(f"GroupLimited.inner: {type(config.inner).__name__} does not look at groups; use TopK")
        self.by_order, self.ragged = self.inner.by_order, self.inner.ragged
        self.top_k = min(self.inner.top_k, self.kept * self.size)
        self._check(self.inner.top_k)

    def _check(self, k: float) -> None:
        if not self.ragged and k > self.kept * self.size:
            raise UserError(
                f"GroupLimited: {self.kept} groups of {self.size} cannot give {k} experts; keep more groups"
            )

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        self._check(signals.knob("top_k", self.inner.top_k))
        T = scores.order.shape[0]
        if self.by_order and int(signals.knob("top_k", self.inner.top_k)) > self.kept * self.size:
            raise UserError(f"GroupLimited: top_k is over the {self.kept * self.size} experts of the kept groups")
        order = scores.order.detach().view(T, self.groups, self.size)
        worth = torch.topk(order, self.best, dim=-1).values.sum(dim=-1)  # values only: no ties to break
        inside = torch.zeros_like(worth, dtype=torch.bool).scatter(1, highest(worth, self.kept), True)
        allowed = inside.repeat_interleave(self.size, dim=1)
        return self.inner(changed(scores, allowed=allowed), x, signals.at("inner"))
