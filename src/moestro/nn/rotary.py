"""Rotary positions: half-split or interleaved pairs, part of the head or all of it, YaRN."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from .config import Rotary as RotaryConfig
from .config import YaRN
from .constants import Constants

__all__ = ["Rotary", "frequencies", "rotate"]


def frequencies(config: RotaryConfig, width: int) -> tuple[Tensor, float]:
    """Angle per position of each pair, [width / 2] float64, and the factor on queries and keys.

    Source: Su et al. 2021, section 3.2.2; with YaRN, Peng et al. 2023, eq. 17-23 and the temperature of eq. 24.
    """
    pair = torch.arange(0, width, 2, dtype=torch.float64)
    theta = config.base ** (-pair / width)
    scaling = config.scaling
    if scaling is None:
        return theta, 1.0
    if not isinstance(scaling, YaRN):
        raise UserError(f"Rotary.scaling: {type(scaling).__name__} is not known to rotary positions")
    if scaling.as_released:
        low, high = (
            width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.base))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        kept = 1 - ((pair / 2 - low) / ((high - low) or 1e-3)).clamp(0, 1)
    else:
        turns = scaling.original_context * theta / (2 * math.pi)
        kept = ((turns - scaling.beta_slow) / (scaling.beta_fast - scaling.beta_slow)).clamp(0, 1)
    factor = scaling.attention_factor
    if factor is None and scaling.mscale and scaling.mscale_all_dim:
        factor = scaling.sharpness(scaling.mscale) / scaling.sharpness(scaling.mscale_all_dim)
    elif factor is None:
        factor = scaling.sharpness(1.0)
    return theta * kept + theta / scaling.factor * (1 - kept), factor


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int) -> Tensor:
    half = sin.shape[-1]
    if 2 * half < x.shape[-1]:
        turned = _turn(x[..., : 2 * half], cos, sin, interleaved, sign)
        return torch.cat((turned, x[..., 2 * half :]), dim=-1)
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    y = x * (cos.repeat_interleave(2, dim=-1) if interleaved else torch.cat((cos, cos), dim=-1))
    y[..., first].addcmul_(x[..., second], sin, value=-sign)
    y[..., second].addcmul_(x[..., first], sin, value=sign)
    return y.to(x.dtype)


class _Rotate(torch.autograd.Function):
    """A rotation; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.sign = interleaved, sign
        return _turn(x, cos, sin, interleaved, sign)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grads[0], cos, sin, ctx.interleaved, -ctx.sign), None, None, None, None  # type: ignore[return-value]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the pairs of x.

    Shapes: x [B, S, H, d] of any dtype; cos, sin [S, 1, r] or [B, S, 1, r] with 2r <= d, without gradient, in fp32, or
    float64 for float64. Products are taken in their dtype, the result is in that of x.
    """
    return _Rotate.apply(x, cos, sin, interleaved, 1)  # type: ignore[return-value]


class Rotary(Constants):
    """Rotates queries and keys by their position.

    Shapes: q [B, S, H, d], k [B, S, H', d]; position [B, S] int64, or None for start, start + 1, ... in every sequence.
    """

    frequency: Tensor

    def __init__(self, config: RotaryConfig, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.width = int(head_dim * config.fraction)
        if self.width % 2 or not self.width:
            raise UserError(
                f"Rotary: {config.fraction} of a head of {head_dim} is {self.width} entries, which is no even number; "
                "change head_dim or fraction"
            )
        self.factor = frequencies(config, self.width)[1]
        self.make_constants()

    def compute(self) -> dict[str, Tensor]:
        return {"frequency": frequencies(self.config, self.width)[0].to(torch.float32)}

    def of_one(self, position: int) -> dict[str, Any]:
        """What `ops.few.attend_one` needs to know to turn one token."""
        return {
            "position": position,
            "frequency": self.frequency,
            "factor": self.factor,
            "interleaved": self.config.style == "interleaved",
        }

    def forward(self, q: Tensor, k: Tensor, position: Tensor | None, start: int = 0) -> tuple[Tensor, Tensor]:
        if position is None:
            position = torch.arange(start, start + q.shape[1], device=q.device)
        angle = (position.to(torch.float32)[..., None] * self.frequency)[..., None, :]
        cos, sin = angle.cos(), angle.sin()
        if self.factor != 1.0:
            cos, sin = cos * self.factor, sin * self.factor
        if q.dtype == torch.float64:
            cos, sin = cos.double(), sin.double()
        flip = self.config.style == "interleaved"
        return rotate(q, cos, sin, flip), rotate(k, cos, sin, flip)
