"""Score steps: how a unit becomes one logit per expert."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.carry import Carry
from ..core.params import ParamInfo
from ..core.pytree import changed
from ..core.signals import Signals
from ..ops import few, ordered
from . import config as cfg
from .segments import segment_mean
from .steps import Scores, ScoreStep

__all__ = ["CosineScore", "FrozenScore", "LinearScore", "MLPScore", "SegmentMeanScore", "UniformScore"]

_ACTIVATION = {"gelu": F.gelu, "tanh": torch.tanh, "relu": F.relu, "silu": F.silu}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x, whatever the parameters are stored in."""
    return few.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class LinearScore(ScoreStep):
    """logits = x W^T (+ b), W [E', D] (Shazeer et al. 2017; Switch; Mixtral)."""

    def __init__(self, config: cfg.Linear, dim: int, num_ids: int) -> None:
        super().__init__()
        self.deterministic, self.init_std = config.deterministic, config.init_std
        self.weight = nn.Parameter(torch.empty(num_ids, dim))
        self.bias = nn.Parameter(torch.empty(num_ids)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02 if self.init_std is None else self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        if self.deterministic:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return Scores(logits=ordered.linear(x, self.weight.to(x.dtype), bias)), carry
        return Scores(logits=linear(x, self.weight, self.bias)), carry

    def param_info(self) -> dict[str, ParamInfo]:
        return {
            "weight": ParamInfo(role="router", matrix_axes=(0, 1), init_std=self.init_std),
            "bias": ParamInfo(role="router", decay=False, init_std=0.0),
        }

    def extra_flops(self, seq_len: int) -> int:
        return 2 * self.weight.numel()


class MLPScore(ScoreStep):
    """logits = W act(... act(W_1 x + b_1)), W [E', hidden] without bias (T2MIR's gate; ZAYA1 eqs. 3-4)."""

    def __init__(self, config: cfg.MLP, dim: int, num_ids: int) -> None:
        super().__init__()
        sizes = [dim] + [config.hidden] * config.depth
        pairs = itertools.pairwise(sizes)
        self.activation = config.activation
        self.hidden = nn.ModuleList(nn.Linear(i, o, bias=config.bias) for i, o in pairs)
        self.out = nn.Linear(config.hidden, num_ids, bias=False)

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        act = _ACTIVATION[self.activation]
        for layer in self.hidden:
            x = act(linear(x, layer.weight, layer.bias))  # type: ignore[arg-type]
        return Scores(logits=linear(x, self.out.weight)), carry


class CosineScore(ScoreStep):
    """logits = s * cos(P x, w_e): prototypes w [E', rank or D], optional projection P [rank, D].

    s = min(scale * exp(log_scale), max_scale) with log_scale learned from 0, or the constant `scale`
    (X-MoE, arXiv 2204.09179 eq. 5; the clamp as in Tutel's cosine router).
    """

    def __init__(self, config: cfg.Cosine, dim: int, num_ids: int) -> None:
        super().__init__()
        self.scale, self.max_scale = config.scale, config.max_scale
        width = dim if config.rank is None else config.rank
        self.prototypes = nn.Parameter(torch.empty(num_ids, width))
        self.projection = None if config.rank is None else nn.Parameter(torch.empty(width, dim))
        self.log_scale = nn.Parameter(torch.empty(1)) if config.learned_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prototypes, std=0.02)
        if self.projection is not None:
            nn.init.normal_(self.projection, std=0.02)
        if self.log_scale is not None:
            nn.init.zeros_(self.log_scale)

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        if self.projection is not None:
            x = linear(x, self.projection)
        w = self.prototypes.to(x.dtype)
        cosine = F.linear(F.normalize(x, dim=-1, eps=1e-12), F.normalize(w, dim=-1, eps=1e-12))
        if self.log_scale is None:
            return Scores(logits=cosine * self.scale), carry
        room = math.log(self.max_scale / self.scale)
        return Scores(logits=cosine * (self.scale * self.log_scale.to(x.dtype).clamp(max=room).exp())), carry

    def param_info(self) -> dict[str, ParamInfo]:
        return {
            "prototypes": ParamInfo(role="router", matrix_axes=(0, 1), decay=False),
            "projection": ParamInfo(role="router", matrix_axes=(0, 1)),
            "log_scale": ParamInfo(role="router", decay=False, init_std=0.0),
        }

    def extra_flops(self, seq_len: int) -> int:
        return 2 * self.prototypes.numel() + (0 if self.projection is None else 2 * self.projection.numel())


class FrozenScore(ScoreStep):
    """Another score whose parameters take no gradient, while x does (SMoE-Dropout, arXiv 2303.01610)."""

    def __init__(self, config: cfg.Frozen, dim: int, num_ids: int) -> None:
        super().__init__()
        self.inner: ScoreStep = config.inner.build(dim, num_ids)
        self.inner.requires_grad_(False)

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        scores, after = self.inner(x, signals.at("inner"), carry.at("inner"))
        return scores, carry.back("inner", after)


class SegmentMeanScore(ScoreStep):
    """logits of unit t = mean of the inner logits over the valid units of its segment (34, arXiv 2401.15713, first
    version: the router averaged over a sentence's tokens). Needs segment [T] int64."""

    needs = ("segment",)
    causal = False

    def __init__(self, config: cfg.SegmentMean, dim: int, num_ids: int) -> None:
        super().__init__()
        self.inner: ScoreStep = config.inner.build(dim, num_ids)

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        scores, after = self.inner(x, signals.at("inner"), carry.at("inner"))
        assert signals.segment is not None
        mean = segment_mean(scores.logits, signals.segment, signals.valid)
        return changed(scores, logits=mean), carry.back("inner", after)


class UniformScore(ScoreStep):
    """Equal logits, no parameters."""

    def __init__(self, config: cfg.Uniform, dim: int, num_ids: int) -> None:
        super().__init__()
        self.num_ids = num_ids

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        return Scores(logits=x.new_zeros(x.shape[0], self.num_ids)), carry
