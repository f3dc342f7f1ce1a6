"""Configs of expert banks. Built with (dim, num_experts)."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import Config, config


@config
class Experts(Config):
    """Base of expert banks: what is built follows `core.protocols.Experts`."""


@config
class Gated(Experts):
    """Gated MLP experts (SwiGLU by default): down(act(gate(x)) * up(x)), stacked, no bias."""

    builds: ClassVar[str] = "moestro.experts.gated:GatedBank"
    width: int | tuple[int, ...] = 256
    """Hidden width of each expert; a tuple gives every expert its own."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    """Activation of the gate."""
