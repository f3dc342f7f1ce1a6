"""Rotary positions: half-split or interleaved pairs, part of the head or all of it, YaRN, LongRoPE."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from .config import Interpolated, Llama3, LongRoPE, YaRN
from .config import Rotary as RotaryConfig
from .constants import Constants

__all__ = ["Rotary", "frequencies", "rotate"]


def frequencies(config: RotaryConfig, width: int, long: bool = False) -> tuple[Tensor, float]:
    """Angle per position of each pair, [width / 2] float64, and the factor on queries and keys.

    long: those of LongRoPE for passes beyond the original context. Source: Su et al. 2021, section 3.2.2; with YaRN,
    Peng et al. 2023, eq. 17-23 and the temperature of eq. 24; with LongRoPE, Ding et al. 2024, section 3.
    """
    pair = torch.arange(0, width, 2, dtype=torch.float64)
    theta = config.base ** (-pair / width)
    scaling = config.scaling
    if scaling is None:
        return theta, 1.0
    if isinstance(scaling, LongRoPE):
        divisor = scaling.long_factor if long else scaling.short_factor
        if divisor and len(divisor) != len(theta):
            raise UserError(f"LongRoPE: {len(divisor)} factors for {len(theta)} rotated pairs; give one for each")
        stretched = theta / torch.tensor(divisor, dtype=torch.float64) if divisor else theta
        return stretched, scaling.long_scale if long else scaling.short_scale
    if isinstance(scaling, Interpolated):
        return theta / scaling.factor, 1.0
    if isinstance(scaling, Llama3):
        turns = scaling.original_context * theta / (2 * math.pi)
        kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        return theta * kept + theta / scaling.factor * (1 - kept), 1.0
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

    LongRoPE with use="auto" turns all of a pass by one set, whichever its last position asks for. Keys in a cache were
    turned already: a pass that goes on with a cache beyond the original context, when the cache does not, is a
    `UserError`.
    """

    frequency: Tensor
    long_frequency: Tensor

    def __init__(self, config: RotaryConfig, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.width = int(head_dim * config.fraction)
        if self.width % 2 or not self.width:
            raise UserError(
                f"Rotary: {config.fraction} of a head of {head_dim} is {self.width} entries, which is no even number; "
                "change head_dim or fraction"
            )
        scaling = config.scaling if isinstance(config.scaling, LongRoPE) else None
        self.always_long = scaling is not None and scaling.use == "long"
        self.switch = scaling.original_context if scaling is not None and scaling.use == "auto" else None
        self.factor = frequencies(config, self.width, self.always_long)[1]
        self.long_factor = frequencies(config, self.width, True)[1]
        self.make_constants()

    def compute(self) -> dict[str, Tensor]:
        made = {"frequency": frequencies(self.config, self.width, self.always_long)[0].to(torch.float32)}
        if self.switch is not None:
            made["long_frequency"] = frequencies(self.config, self.width, True)[0].to(torch.float32)
        return made

    def of_one(self, position: int) -> dict[str, Any]:
        """What `ops.few.attend_one` needs to know to turn one token."""
        frequency, factor = self._set(position, position + 1, None)
        return {
            "position": position,
            "frequency": frequency,
            "factor": factor,
            "interleaved": self.config.style == "interleaved",
        }

    def _set(self, start: int, stop: int, position: Tensor | None) -> tuple[Tensor, float | Tensor]:
        """Frequencies and factor of a pass over the places start..stop-1, at the given positions if any."""
        if self.switch is None:
            return self.frequency, self.factor
        if 0 < start <= self.switch < stop:
            raise UserError(
                f"LongRoPE: this cached pass goes beyond the original context of {self.switch} tokens, where other "
                'factors hold than the cached keys were turned by; run the whole sequence at once, or set use="long"'
            )
        if position is None:
            return (self.long_frequency, self.long_factor) if stop > self.switch else (self.frequency, self.factor)
        long = position.max() >= self.switch
        factor = torch.where(long, self.long_factor, self.factor)
        return torch.where(long, self.long_frequency, self.frequency), factor.to(torch.float32)

    def forward(self, q: Tensor, k: Tensor, position: Tensor | None, start: int = 0) -> tuple[Tensor, Tensor]:
        frequency, factor = self._set(start, start + q.shape[1], position)
        if position is None:
            position = torch.arange(start, start + q.shape[1], device=q.device)
        angle = (position.to(torch.float32)[..., None] * frequency)[..., None, :]
        cos, sin = angle.cos(), angle.sin()
        if isinstance(factor, Tensor) or factor != 1.0:
            cos, sin = cos * factor, sin * factor
        if q.dtype == torch.float64:
            cos, sin = cos.double(), sin.double()
        flip = self.config.style == "interleaved"
        return rotate(q, cos, sin, flip), rotate(k, cos, sin, flip)
