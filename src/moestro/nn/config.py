"""Configs of network parts: norms, positions, sequence mixers, dense feed-forward layers. Built with (dim)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from ..core.config import Config, config
from ..core.errors import UserError

# Norms --------------------------------------------------------------------------------------------------------------


@config
class Norm(Config):
    """Base of norms."""


@config
class RMSNorm(Norm):
    """x / rms(x) * gain, computed in fp32 (Zhang and Sennrich 2019)."""

    builds: ClassVar[str] = "moestro.nn.norm:RMSNorm"
    eps: float = 1e-6
    """Added to the mean square."""


# Positions ----------------------------------------------------------------------------------------------------------


@config
class Scaling(Config):
    """Base of the ways to stretch rotary positions beyond the context they were trained for."""


@config
class YaRN(Scaling):
    """YaRN (Peng et al. 2023, arXiv 2309.00071): fast rotations stay, slow ones are stretched, attention sharpens."""

    factor: float = 4.0
    """Longest context divided by the original one."""
    original_context: int = 4096
    """Context length of the original training."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this within the original context are left alone."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are interpolated fully."""
    attention_factor: float | None = None
    """Factor on queries and on keys; None = 0.1 ln(factor) + 1, or what mscale and mscale_all_dim say."""
    mscale: float | None = None
    """With mscale_all_dim, attention_factor None = (0.1 mscale ln(factor) + 1) / (the same with mscale_all_dim)."""
    mscale_all_dim: float | None = None
    """Latent attention multiplies its scores by (0.1 mscale_all_dim ln(factor) + 1)^2 (DeepSeek-V2 and V3)."""
    as_released: bool = False
    """Ramp over the dimension index between two bounds, as in the authors' code and all released checkpoints;
    otherwise over the number of turns, as in the paper."""
    truncate: bool = True
    """As released only: whether those bounds are rounded outwards to whole indices (GPT-OSS: they are not)."""

    def sharpness(self, mscale: float) -> float:
        """0.1 mscale ln(factor) + 1."""
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_context < 1 or self.beta_fast <= self.beta_slow:
            raise UserError("YaRN: needs factor >= 1, original_context >= 1 and beta_fast > beta_slow")


@config
class Positions(Config):
    """Base of position encodings that act on queries and keys. Built with (head_dim)."""


@config
class Rotary(Positions):
    """Rotary position embedding (Su et al. 2021)."""

    builds: ClassVar[str] = "moestro.nn.rotary:Rotary"
    base: float = 10_000.0
    """Base of the geometric series of wavelengths."""
    style: Literal["half", "interleaved"] = "half"
    """Which entries form a pair: i and i + half (Hugging Face), or 2i and 2i + 1 (the paper)."""
    fraction: float = 1.0
    """Share of the head's width that is rotated; the rest is left alone."""
    scaling: Scaling | None = None
    """How positions are stretched."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"Rotary.fraction: {self.fraction} does not lie in (0, 1]")


# Mixers -------------------------------------------------------------------------------------------------------------


@config
class Mixer(Config):
    """Base of sequence mixers: `(x [B, S, D], signals, state | None) -> (y, state)`."""


@config
class Attention(Mixer):
    """Causal grouped-query attention."""

    builds: ClassVar[str] = "moestro.nn.attention:Attention"
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads; None = as many as query heads."""
    head_dim: int | None = None
    """Width of a head; None = dim / num_heads."""
    qk_norm: Literal["head", "full"] | None = None
    """RMS norm of queries and keys: of each head (Qwen3), or over the full width before it is split (OLMo 2, OLMoE)."""
    norm_eps: float = 1e-6
    """Epsilon of those norms."""
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None = all before it."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Which projections have a bias."""
    positions: Positions | None = Rotary()
    """Position encoding of queries and keys; None = none."""
    scale: float | None = None
    """Factor on the scores; None = head_dim ** -0.5."""

    def __post_init__(self) -> None:
        kv = self.num_kv_heads if self.num_kv_heads is not None else self.num_heads
        if self.num_heads < 1 or kv < 1 or self.num_heads % kv:
            raise UserError(f"Attention: num_heads {self.num_heads} is no multiple of num_kv_heads {kv}")
        if self.window is not None and self.window < 1:
            raise UserError(f"Attention.window: {self.window} is below 1; use None for no window")

    def width(self, dim: int) -> int:
        """Width of one head in a model of width `dim`."""
        if self.head_dim is not None:
            return self.head_dim
        if dim % self.num_heads:
            raise UserError(f"Attention: dim {dim} is no multiple of num_heads {self.num_heads}; set head_dim")
        return dim // self.num_heads


# Feed-forward -------------------------------------------------------------------------------------------------------


@config
class FeedForward(Config):
    """A dense gated MLP (SwiGLU by default), laid out like one gated expert."""

    builds: ClassVar[str] = "moestro.nn.feedforward:FeedForward"
    width: int = 512
    """Hidden width."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    """Activation of the gate."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"FeedForward.width: {self.width} is below 1")
