"""Network parts that know nothing of experts: norms, positions, attention, dense feed-forward layers."""

from __future__ import annotations

from .config import (
    Attention,
    FeedForward,
    Interpolated,
    LatentAttention,
    LayerNorm,
    Llama3,
    LongRoPE,
    Mixer,
    Norm,
    Positions,
    RMSNorm,
    Rotary,
    Scaling,
    YaRN,
)

__all__ = [
    "Attention",
    "FeedForward",
    "Interpolated",
    "LatentAttention",
    "LayerNorm",
    "Llama3",
    "LongRoPE",
    "Mixer",
    "Norm",
    "Positions",
    "RMSNorm",
    "Rotary",
    "Scaling",
    "YaRN",
]
