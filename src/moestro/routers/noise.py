"""Score steps with noise: on the logits, where the noisy ones only decide who is selected, and on what is scored."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.carry import Carry
from ..core.draws import normal, uniform
from ..core.params import ParamInfo
from ..core.pytree import changed
from ..core.signals import Signals
from . import config as cfg
from .score import linear
from .steps import Scores, ScoreStep, unit_ids

__all__ = ["FixedNoiseScore", "JitterScore", "NoisyScore"]


class _Noise(ScoreStep):
    """Leaves in `extra`, for the load loss (Shazeer et al. 2017, eqs. 8-10), in training only:

    noisy_logits: [T, E'] clean logits + std * standard normal draw. noise_std: [T, E'] the standard deviation.
    Both are differentiable; draws are hashes of the seed and the unit ids (0..T-1 without `signals.unit_id`).
    """

    inner: ScoreStep

    def std(self, x: Tensor, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        scores, after = self.inner(x, signals.at("inner"), carry.at("inner"))
        carry = carry.back("inner", after)
        if not self.training:
            return scores, carry
        logits = scores.logits
        std = self.std(x, logits)
        draw = normal(signals.seed, unit_ids(signals, logits), logits.shape[1], dtype=logits.dtype)
        extra = {**scores.extra, "noisy_logits": logits + std * draw, "noise_std": std}
        return changed(scores, extra=extra), carry


class NoisyScore(_Noise):
    """std = softplus(x W_n^T) + floor with W_n [E', D] learned from 0 (Shazeer et al. 2017, eq. 4; T2MIR's floor)."""

    def __init__(self, config: cfg.Noisy, dim: int, num_ids: int) -> None:
        super().__init__()
        self.inner = config.inner.build(dim, num_ids)
        self.floor = config.floor
        self.noise = nn.Parameter(torch.zeros(num_ids, dim))

    def std(self, x: Tensor, logits: Tensor) -> Tensor:
        return F.softplus(linear(x, self.noise)) + self.floor

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.noise)

    def param_info(self) -> dict[str, ParamInfo]:
        return {"noise": ParamInfo(role="router", matrix_axes=(0, 1), init_std=0.0)}

    def extra_flops(self, seq_len: int) -> int:
        return 2 * self.noise.numel() if self.training else 0


class FixedNoiseScore(_Noise):
    """std = a constant, 1 / E' by default (V-MoE, arXiv 2106.05974, app. A)."""

    def __init__(self, config: cfg.FixedNoise, dim: int, num_ids: int) -> None:
        super().__init__()
        self.inner = config.inner.build(dim, num_ids)
        self.value = 1.0 / num_ids if config.std is None else config.std

    def std(self, x: Tensor, logits: Tensor) -> Tensor:
        return torch.full_like(logits, self.value)


class JitterScore(ScoreStep):
    """In training, another score of x * u with u uniform in 1 - noise .. 1 + noise for every entry; selection, weights
    and losses all see the logits of that (Switch Transformer, arXiv 2101.03961, section 2.4, "input jitter").

    Draws are hashes of the seed and the unit ids. The experts see x itself.
    """

    inner: ScoreStep

    def __init__(self, config: cfg.Jitter, dim: int, num_ids: int) -> None:
        super().__init__()
        self.inner = config.inner.build(dim, num_ids)
        self.noise = config.noise

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        if self.training and self.noise > 0:
            draw = uniform(signals.seed, unit_ids(signals, x), x.shape[1]).to(x.dtype)
            x = x * (1 + self.noise * (2 * draw - 1))
        scores, after = self.inner(x, signals.at("inner"), carry.at("inner"))
        return scores, carry.back("inner", after)
