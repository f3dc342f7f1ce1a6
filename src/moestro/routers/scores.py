"""Configs of score steps: how a unit becomes one logit per expert."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import config
from ..core.errors import UserError
from .bases import Score

__all__ = ["Cosine", "FixedNoise", "Frozen", "Jitter", "Linear", "MLP", "Noisy", "SegmentMean", "Uniform"]


@config
class Linear(Score):
    """One linear map, as in Switch and Mixtral."""

    builds: ClassVar[str] = "moestro.routers.score:LinearScore"
    bias: bool = False
    """Whether the map has a bias."""
    init_std: float | None = None
    """Standard deviation of its initial weights; None = that of the model's matrices. 1 is a near one-hot choice."""
    deterministic: bool = False
    """Whether a unit's logits are bitwise equal alone and in any batch; slower, on the CPU in fp32 only."""

    def __post_init__(self) -> None:
        self.positive("init_std")


@config
class MLP(Score):
    """A small network: `depth` hidden layers, then a linear map to the logits (T2MIR, ZAYA1)."""

    builds: ClassVar[str] = "moestro.routers.score:MLPScore"
    hidden: int = 64
    """Width of each hidden layer."""
    depth: int = 1
    """Number of hidden layers."""
    activation: Literal["gelu", "tanh", "relu", "silu"] = "gelu"
    """Activation after each hidden layer."""
    bias: bool = True
    """Whether the hidden layers have biases; the map to the logits never has one."""

    def __post_init__(self) -> None:
        self.positive("hidden", "depth")


@config
class Cosine(Score):
    """scale * cosine of x with one prototype per expert (X-MoE, Tutel's cosine router, ProMoE)."""

    builds: ClassVar[str] = "moestro.routers.score:CosineScore"
    rank: int | None = None
    """Width to which x is projected first; None = no projection."""
    scale: float = 10.0
    """Factor on the cosine (the inverse temperature), at the start where it is learned."""
    learned_scale: bool = True
    """Whether the factor is learned."""
    max_scale: float = 100.0
    """The learned factor never exceeds this."""

    def __post_init__(self) -> None:
        self.positive("scale", "max_scale")
        self.positive("rank")
        if self.learned_scale and self.scale > self.max_scale:
            raise UserError(f"Cosine.scale: {self.scale} is over max_scale {self.max_scale}")


@config
class Frozen(Score):
    """Another score whose parameters are never trained; gradient still flows to x (SMoE-Dropout)."""

    builds: ClassVar[str] = "moestro.routers.score:FrozenScore"
    inner: Score = Linear()
    """The score that is frozen."""


@config
class Noisy(Score):
    """Another score, and in training noise with a learned standard deviation, for selection only (Shazeer 2017)."""

    builds: ClassVar[str] = "moestro.routers.noise:NoisyScore"
    inner: Score = Linear()
    """The score that the noise is added to."""
    floor: float = 0.01
    """Added to the learned standard deviation, so that it never reaches 0."""


@config
class FixedNoise(Score):
    """Another score, and in training noise of fixed standard deviation, for selection only (V-MoE)."""

    builds: ClassVar[str] = "moestro.routers.noise:FixedNoiseScore"
    inner: Score = Linear()
    """The score that the noise is added to."""
    std: float | None = None
    """Standard deviation of the noise; None = 1 / number of experts."""


@config
class Jitter(Score):
    """Another score, in training of x times uniform noise near 1 (Switch Transformer)."""

    builds: ClassVar[str] = "moestro.routers.noise:JitterScore"
    inner: Score = Linear()
    """The score of the noisy x."""
    noise: float = 0.01
    """Entries are multiplied by numbers between 1 - noise and 1 + noise."""

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise UserError(f"Jitter.noise: {self.noise} does not lie in [0, 1)")


@config
class SegmentMean(Score):
    """Another score, averaged over the tokens of a sequence, which are then routed alike (34, sentence-wise routing).

    With TopK and Raw it is the paper's sentence-wise top-k, with TopK(k=1) and Constant its sentence switch. Needs
    `segment`, which models give. It looks at later tokens: not for decoders.
    """

    builds: ClassVar[str] = "moestro.routers.score:SegmentMeanScore"
    inner: Score = Linear()
    """The score that is averaged; one without noise."""

    def __post_init__(self) -> None:
        if isinstance(self.inner, Noisy | FixedNoise | Jitter):
            raise UserError(
                f"SegmentMean.inner: {type(self.inner).__name__} draws for each token; take a score without noise"
            )


@config
class Uniform(Score):
    """No parameters and equal logits, for selections that look at no score (random, by label)."""

    builds: ClassVar[str] = "moestro.routers.score:UniformScore"
