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


@config
class LayerNorm(Norm):
    """(x - mean) / standard deviation * gain + bias, computed in fp32 (Ba et al. 2016)."""

    builds: ClassVar[str] = "moestro.nn.norm:LayerNorm"
    eps: float = 1e-5
    """Added to the variance."""
    bias: bool = True
    """Whether a learned bias is added."""


@config
class NoNorm(Norm):
    """The identity, where a block goes without a norm (the first one of ModernBERT)."""

    builds: ClassVar[str] = "moestro.nn.norm:NoNorm"


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
class LongRoPE(Scaling):
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a searched divisor for every frequency, one set for passes within
    the original context and one for longer ones."""

    short_factor: tuple[float, ...] = ()
    """Divisor of each frequency in passes that stay within the original context, one per rotated pair; () = ones."""
    long_factor: tuple[float, ...] = ()
    """Divisor of each frequency in longer passes; () = ones."""
    original_context: int = 4096
    """Context length of the original training."""
    short_scale: float = 1.0
    """Factor on queries and on keys in short passes."""
    long_scale: float = 1.0
    """Factor on queries and on keys in long passes."""
    use: Literal["auto", "short", "long"] = "auto"
    """Which set: by the last position of a pass, or always one of them. Cached passes must not change sets half-way, so
    generation across the original context needs "long" (or "short")."""

    def __post_init__(self) -> None:
        self.at_least(1, "original_context")
        self.positive("short_scale", "long_scale")
        if min(*self.short_factor, *self.long_factor, 1.0, 1.0) <= 0:
            raise UserError("LongRoPE: every factor must be positive")


@config
class Interpolated(Scaling):
    """Linear interpolation (Chen et al. 2023, arXiv 2306.15595): all rotations are slowed by the same factor."""

    factor: float = 4.0
    """Longest context divided by the original one."""

    def __post_init__(self) -> None:
        self.positive("factor")


@config
class Llama3(Scaling):
    """Llama 3.1's stretching (arXiv 2407.21783): slow rotations by the factor, fast ones not, between them a ramp."""

    factor: float = 8.0
    """How much slow rotations are stretched."""
    low: float = 1.0
    """Dimensions that turn less often than this within the original context are stretched fully."""
    high: float = 4.0
    """Dimensions that turn more often than this are left alone."""
    original_context: int = 8192
    """Context length of the original training."""

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_context < 1 or self.high <= self.low:
            raise UserError("Llama3: needs factor >= 1, original_context >= 1 and high > low")


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


@config
class RelativeBias(Positions):
    """T5's relative positions: a learned number per head and bucket of distances, added to the scores.

    Near distances have a bucket each, farther ones share buckets of logarithmic width (Raffel et al. 2020, sec. 2.1).
    """

    builds: ClassVar[str] = "moestro.nn.relative:RelativeBias"
    buckets: int = 32
    """Number of buckets; attention in both directions uses half of them for each."""
    max_distance: int = 128
    """From this distance on, all share the last bucket."""

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 2:
            raise UserError(f"RelativeBias.buckets: must be even and at least 4, found {self.buckets}")
        if self.max_distance <= self.buckets // 2:
            raise UserError(
                f"RelativeBias.max_distance: {self.max_distance} must be over half of the {self.buckets} buckets"
            )


@config
class AbsolutePositions(Config):
    """Base of positions that are added to embeddings. Built with (dim, context)."""


@config
class Learned(AbsolutePositions):
    """One learned vector per position."""

    builds: ClassVar[str] = "moestro.nn.positions:Learned"


@config
class Sinusoidal(AbsolutePositions):
    """Sines and cosines of wavelengths in a geometric series, first all sines (Vaswani et al. 2017, section 3.5)."""

    builds: ClassVar[str] = "moestro.nn.positions:Sinusoidal"
    base: float = 10_000.0
    """Base of the series."""
    endpoint: bool = False
    """Whether the last wavelength is 2 pi base itself (tensor2tensor, fairseq), not a step short of it (the paper)."""
    first: int = 0
    """Number of the first position (fairseq: 2, one more than its padding token)."""

    def __post_init__(self) -> None:
        self.positive("base")
        self.at_least(0, "first")


def _check_dropout(config: Config, share: float) -> None:
    if not 0 <= share < 1:
        raise UserError(f"{type(config).__name__}.dropout: {share} does not lie in [0, 1)")


# Mixers -------------------------------------------------------------------------------------------------------------


@config
class Mixer(Config):
    """Base of sequence mixers: `(x [B, S, D], signals, state | None) -> (y, state)`."""


@config
class Attention(Mixer):
    """Grouped-query attention, causal unless said otherwise."""

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
    """A token sees itself and the window - 1 tokens before it, without `causal` on both sides; None = all."""
    causal: bool = True
    """Whether a token sees only itself and what came before; otherwise it sees its whole sequence (encoders)."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Which projections have a bias."""
    positions: Positions | None = Rotary()
    """Position encoding of queries and keys; None = none."""
    scale: float | None = None
    """Factor on the scores; None = head_dim ** -0.5."""
    sinks: bool = False
    """Whether every head has a learned logit that joins the softmax and stands for looking at nothing (GPT-OSS)."""
    dropout: float = 0.0
    """Share of the entries of the attention maps that is dropped in training (Vaswani et al. 2017)."""

    def __post_init__(self) -> None:
        kv = self.num_kv_heads if self.num_kv_heads is not None else self.num_heads
        if self.num_heads < 1 or kv < 1 or self.num_heads % kv:
            raise UserError(f"Attention: num_heads {self.num_heads} is no multiple of num_kv_heads {kv}")
        if self.window is not None and self.window < 1:
            raise UserError(f"Attention.window: {self.window} is below 1; use None for no window")
        if self.sinks and isinstance(self.positions, RelativeBias):
            raise UserError("Attention.sinks: cannot be joined with a relative bias on the scores; leave one out")
        _check_dropout(self, self.dropout)
        if self.sinks and self.dropout:
            raise UserError("Attention.sinks: cannot be joined with dropout of the attention maps; leave one out")

    def width(self, dim: int) -> int:
        """Width of one head in a model of width `dim`."""
        if self.head_dim is not None:
            return self.head_dim
        if dim % self.num_heads:
            raise UserError(f"Attention: dim {dim} is no multiple of num_heads {self.num_heads}; set head_dim")
        return dim // self.num_heads


@config
class LatentAttention(Mixer):
    """Causal attention whose keys and values are made from one small vector per token (multi-head latent attention).

    A head's key is [nope | rope]: a part that is made from the compressed vector, and a rotated part that all heads
    share. The cache holds `cache_width` numbers per token.
    """

    builds: ClassVar[str] = "moestro.nn.latent:LatentAttention"
    num_heads: int = 4
    """Heads."""
    q_rank: int | None = None
    """Width that queries are compressed to; None = they are not."""
    kv_rank: int = 64
    """Width that keys and values are compressed to."""
    nope_dim: int = 32
    """Width of the part of a head's queries and keys that is not rotated."""
    rope_dim: int = 16
    """Width of the rotated part."""
    value_dim: int = 32
    """Width of a head's values."""
    norm_eps: float = 1e-6
    """Epsilon of the norms of the compressed vectors."""
    bias: bool = False
    """Whether the maps from the model's width to compressed vectors, and the output map, have a bias."""
    positions: Rotary = Rotary(style="interleaved")
    """Rotation of the rotated part."""
    scale: float | None = None
    """Factor on the scores; None = (nope_dim + rope_dim) ** -0.5, times what YaRN's mscale_all_dim says."""

    def __post_init__(self) -> None:
        self.at_least(1, "num_heads", "kv_rank", "nope_dim", "rope_dim", "value_dim")
        self.positive("q_rank")

    @property
    def cache_width(self) -> int:
        """Numbers that the cache holds per token."""
        return self.kv_rank + self.rope_dim


@config
class CrossAttention(Config):
    """Grouped-query attention to another sequence (an encoder's output). Built with (dim, source_dim)."""

    builds: ClassVar[str] = "moestro.nn.cross:CrossAttention"
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads; None = as many as query heads."""
    head_dim: int | None = None
    """Width of a head; None = dim / num_heads."""
    qk_norm: bool = False
    """RMS norm of each head's queries and keys."""
    norm_eps: float = 1e-6
    """Epsilon of those norms."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Which projections have a bias."""
    scale: float | None = None
    """Factor on the scores; None = head_dim ** -0.5."""
    dropout: float = 0.0
    """Share of the entries of the attention maps that is dropped in training."""

    def __post_init__(self) -> None:
        _check_dropout(self, self.dropout)
        self.attention()

    def attention(self) -> Attention:
        """Self-attention of the same shape."""
        return Attention(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            qk_norm="head" if self.qk_norm else None,
            norm_eps=self.norm_eps,
            bias=self.bias,
            scale=self.scale,
            positions=None,
            causal=False,
        )


# Feed-forward -------------------------------------------------------------------------------------------------------


@config
class FFN(Config):
    """Base of dense feed-forward layers: `(x [..., D], signals, carry) -> (y, carry, trail)`. Built with (dim)."""

    width: int = 512
    """Hidden width."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"{type(self).__name__}.width: {self.width} is below 1")


@config
class FeedForward(FFN):
    """A dense gated MLP (SwiGLU by default), laid out like one gated expert."""

    builds: ClassVar[str] = "moestro.nn.feedforward:FeedForward"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "leaky_relu"] = "silu"
    """Activation of the gate."""


@config
class PlainFeedForward(FFN):
    """A dense MLP of two maps, down(act(up(x))), laid out like one plain expert (the first Transformer, T5, BERT)."""

    builds: ClassVar[str] = "moestro.nn.feedforward:PlainFeedForward"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "leaky_relu"] = "relu"
    """Activation between the maps."""
    bias: bool = False
    """Whether both maps have a bias."""
