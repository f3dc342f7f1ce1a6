"""Score steps: how a unit becomes one logit per expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.carry import Carry
from ..core.params import ParamInfo
from ..core.signals import Signals
from . import config as cfg
from .steps import Scores, ScoreStep

__all__ = ["LinearScore"]


class LinearScore(ScoreStep):
    """logits = x W^T (+ b), W [E', D] (Shazeer et al. 2017; Switch; Mixtral)."""

    def __init__(self, config: cfg.Linear, dim: int, num_ids: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_ids, dim))
        self.bias = nn.Parameter(torch.empty(num_ids)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return Scores(logits=F.linear(x, self.weight.to(x.dtype), bias)), carry

    def param_info(self) -> dict[str, ParamInfo]:
        return {
            "weight": ParamInfo(role="router", matrix_axes=(0, 1)),
            "bias": ParamInfo(role="router", decay=False, init_std=0.0),
        }

    def extra_flops(self, seq_len: int) -> int:
        return 2 * self.weight.numel()
