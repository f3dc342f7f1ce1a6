"""Configs of mix steps: how the distributions of different units are combined before selection. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import config
from .bases import Mix

__all__ = ["AttentionMix", "SimilarityMix"]


@config
class SimilarityMix(Mix):
    """A unit's distribution becomes the mean of those of similar units of its sequence; similarity is learned (03)."""

    builds: ClassVar[str] = "moestro.routers.mix:SimilarityMixStep"
    tau: float = 1.0
    """Temperature: similarities are divided by it before the softmax. Call-time knob: mix_tau."""
    scale: Literal["none", "sqrt_dim"] = "none"
    """"sqrt_dim": similarities are divided by the root of the width as well."""
    start: Literal["identity", "random"] = "identity"
    """Where W_s starts: identity / sqrt(width), to which the parameter adds from zero; or drawn, with standard
    deviation 1 / sqrt(width)."""
    causal: bool = True
    """Whether a unit looks at itself and earlier ones only. Decoders refuse False; encoders and classifiers want it."""

    def __post_init__(self) -> None:
        self.positive("tau")


@config
class AttentionMix(Mix):
    """A unit's distribution becomes the mean of those of the units that it attended to, over all heads of the
    attention before the layer (03). No parameters; as causal as that attention. Needs `attend`, which decoders and
    encoders give their routed layers."""

    builds: ClassVar[str] = "moestro.routers.mix:AttentionMixStep"
    heads: Literal["mean", "posterior"] = "mean"
    """How heads count: equally, or each unit's by how near their contribution comes to what the router reads."""
    sigma: float = 1.0
    """Posterior: standard deviation of what the router reads round a head's contribution; larger = more equal."""

    def __post_init__(self) -> None:
        self.positive("sigma")
