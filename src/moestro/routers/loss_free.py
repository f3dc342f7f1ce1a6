"""Balancing without a loss: a bias that follows the load and takes part in selection only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.pytree import changed
from ..core.signals import Signals
from . import config as cfg
from .steps import Choice, Scores, SelectStep

__all__ = ["LossFreeSelect"]


class LossFreeSelect(SelectStep):
    """Selects by probability + bias; `step` moves the bias by rate * sign(mean load - load).

    Source: Wang et al., arXiv 2408.15664 algorithm 1; DeepSeek-V3, arXiv 2412.19437 eq. 16. The buffer `bias` [E'] is
    fp32 and stays so through `.to(bf16)`, `.half()`, `.double()` and loading: at bf16 a step of 0.001 would be lost.
    Virtual ids keep the bias they are given.
    """

    bias: Tensor
    still = False  # True = `step` moves nothing (fine-tuning with frozen routers)

    def __init__(self, config: cfg.LossFree, num_experts: int, num_ids: int) -> None:
        super().__init__()
        self.rate, self.num_experts = config.rate, num_experts
        self.inner: SelectStep = config.inner.build(num_experts, num_ids)
        if not self.inner.by_order:
            raise UserError(
                f"LossFree.inner: a bias means nothing to {type(config.inner).__name__}; use TopK or GroupLimited"
            )
        self.masks, self.by_order, self.top_k = self.inner.masks, False, self.inner.top_k
        self.register_buffer("bias", torch.zeros(num_ids, dtype=torch.float32))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        rank = scores.order.detach() + self.bias.to(scores.order.dtype)
        return self.inner(changed(scores, rank=rank), x, signals.at("inner"))

    @torch.no_grad()
    def step(self, counts: Tensor) -> None:
        """counts: [E] int64, how many units chose each expert since the last step, summed over ranks."""
        if tuple(counts.shape) != (self.num_experts,) or counts.is_floating_point():
            raise UserError(f"LossFree.step needs [{self.num_experts}] integer counts, not {list(counts.shape)}")
        if self.still:
            return
        # sign(mean - count) in integers, so that no rounding of the mean decides
        missing = counts.sum() - counts * self.num_experts
        self.bias[: self.num_experts] += self.rate * missing.sign().to(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:
            to = self.bias.device
            self.bias = torch.empty_like(self.bias, dtype=torch.float32) if before.is_meta else before.to(to)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "bias" in state_dict:
            state_dict[prefix + "bias"] = state_dict[prefix + "bias"].float()  # matters with assign=True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
