"""Configs of optimisers and learning-rate schedules. Built with (model)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from ..core.config import Config, config
from ..core.errors import UserError

# Schedules: factors on the learning rate, pure functions of (step, steps) ------------------------------------------


@config
class Schedule(Config):
    """Base of schedules. `factor(step, steps)` is the share of the peak learning rate used by step 0..steps-1."""

    warmup: float = 0.05
    """Warm-up from near 0: below 1 a share of all steps, from 1 on a number of steps."""
    floor: float = 0.05
    """Share of the peak learning rate that is left at the end."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < math.inf:
            raise UserError(f"{type(self).__name__}.warmup must not be negative, found {self.warmup}")
        if not 0 <= self.floor <= 1:
            raise UserError(f"{type(self).__name__}.floor must lie in 0..1, found {self.floor}")

    def warmup_steps(self, steps: int) -> int:
        """How many steps the warm-up takes of `steps`."""
        return round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)

    def factor(self, step: int, steps: int) -> float:
        """The factor of step number `step` (from 0) in a training of `steps` steps."""
        warm = self.warmup_steps(steps)
        return (step + 1) / warm if step < warm else self._after(step, steps, warm)

    def _after(self, step: int, steps: int, warm: int) -> float:
        raise NotImplementedError


@config
class Cosine(Schedule):
    """Warm-up, then half a cosine from the peak down to `floor`."""

    def _after(self, step: int, steps: int, warm: int) -> float:
        done = min(1.0, (step - warm) / max(1, steps - warm))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


@config
class WSD(Schedule):
    """Warm-up, stable at the peak, then a straight decay to `floor`; may be extended while still stable."""

    decay: float = 0.3
    """Share of all steps that the decay takes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise UserError(f"WSD.decay must lie in 0..1, found {self.decay}")

    def _after(self, step: int, steps: int, warm: int) -> float:
        length = self.decay * steps
        left = (steps - step) / length if length else 1.0
        return 1.0 if left >= 1 else self.floor + (1 - self.floor) * left


# Optimisers -------------------------------------------------------------------------------------------------------


@config
class Optimizer(Config):
    """Base of optimisers: what is built steps a model's parameters and keeps its state as named tensors."""

    lr: float = 4e-3
    """Peak learning rate."""
    clip: float = 1.0
    """Largest norm of the whole gradient; longer ones are scaled down to it. 0 = no clipping."""
    schedule: Schedule = Cosine()
    """How the learning rate changes over the steps."""

    def __post_init__(self) -> None:
        if self.clip < 0:
            raise UserError(f"{type(self).__name__}.clip must not be negative, found {self.clip}")


@config
class AdamW(Optimizer):
    """AdamW, with groups of parameters by role."""

    builds: ClassVar[str] = "moestro.optim.adamw:AdamWOptimizer"
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors and whatever its module says are not decayed."""
    lr_expert: float = 1.0
    """Factor on the learning rate of routed and shared experts."""
    lr_router: float = 1.0
    """Factor on the learning rate of routers."""
    lr_embedding: float = 1.0
    """Factor on the learning rate of embeddings."""
    lr_head: float = 1.0
    """Factor on the learning rate of the output head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "eps", "lr_expert", "lr_router", "lr_embedding", "lr_head", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"AdamW.{name} must be a number from 0 on, found {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"AdamW.{name} must lie in 0..1 (1 excluded), found {getattr(self, name)}")


@config
class Muon(AdamW):
    """Muon for the matrices of attention, dense layers and experts, each expert and each fused part a matrix of its
    own; AdamW, with the fields it has here, for embeddings, head, norms, routers and all vectors."""

    builds: ClassVar[str] = "moestro.optim.muon:MuonOptimizer"
    momentum: float = 0.95
    """Decay of the mean of gradients that is orthogonalised."""
    nesterov: bool = True
    """Look one step of momentum ahead."""
    iterations: int = 5
    """Newton-Schulz iterations."""
    scale: Literal["match_rms", "original"] = "match_rms"
    """Factor on an update of shape [A, B]: 0.2 sqrt(max(A, B)), as large as AdamW's updates so that its learning rate
    and decay carry over (Moonlight), or sqrt(max(1, A / B)) (Jordan)."""
    lr_matrix: float = 1.0
    """Factor on the learning rate of matrices; with scale "original" they want a higher one than AdamW."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "iterations")
        if not 0 <= self.momentum < 1:
            raise UserError(f"Muon.momentum must lie in 0..1 (1 excluded), found {self.momentum}")
        if not 0 <= self.lr_matrix < math.inf:
            raise UserError(f"Muon.lr_matrix must be a number from 0 on, found {self.lr_matrix}")


# What happens after a step ---------------------------------------------------------------------------------------


@config
class AfterStep(Config):
    """Base of hooks after the optimiser step. Built with (model, steps)."""


@config
class ExpertAveraging(AfterStep):
    """Experts are moved towards their mean after every step (48, Experts Weights Averaging)."""

    builds: ClassVar[str] = "moestro.optim.averaging:ExpertAveraging"
    share: float = 0.3
    """How much of an expert is replaced by the mean of the others in a step, at the end; in [0, 1)."""
    rise: Literal["linear", "constant"] = "linear"
    """From 0 at the first step to the share at the last one, or the same all the time."""
    until: float = 1.0
    """The share of all steps after which it ends and experts go their own ways ("early EWA": below 1)."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UserError(f"ExpertAveraging.share must lie in 0..1 (1 excluded), found {self.share}")
        if not 0 < self.until <= 1:
            raise UserError(f"ExpertAveraging.until must lie in 0..1 (0 excluded), found {self.until}")

    def at(self, step: int, steps: int) -> float:
        """The share after step number `step` (from 0) of a training of `steps` steps."""
        last = max(1, round(self.until * steps))
        if step >= last:
            return 0.0
        return self.share if self.rise == "constant" else self.share * step / max(1, last - 1)
