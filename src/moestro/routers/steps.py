"""What the five steps of a router hand to each other, and their base classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.carry import Carry
from ..core.pytree import pytree, static
from ..core.signals import Signals

__all__ = [
    "Choice",
    "LimitStep",
    "Limited",
    "MixStep",
    "ScoreStep",
    "Scores",
    "SelectStep",
    "Step",
    "WeighStep",
    "unit_ids",
]


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What is known about every (unit, id) pair on the way to a choice.

    Shapes:
        logits: [T, E'] clean logits (before noise, temperature and bias).
        probs: [T, E'] the distribution; the composite router sets it from the logits, mix steps change it.
        rank: [T, E'] or None; what selection orders by where that is not `probs` (noise, bias). Never differentiated.
        allowed: [T, E'] bool or None; False = selection must pass over this id.
        valid: [T] bool or None; False = padding.
        extra: tensors that end in the plan; score steps put "noisy_logits" and "noise_std" here.

    Static: temperature, by which logits were divided before the activation; everywhere, a promise to the weigh step
    that the table of choices holds an id at every place.
    """

    logits: Tensor
    probs: Tensor = None  # type: ignore[assignment]  # set before any step but the score sees it
    rank: Tensor | None = None
    allowed: Tensor | None = None
    valid: Tensor | None = None
    extra: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    temperature: float | Tensor = static(default=1.0)
    everywhere: bool = static(default=False)

    @property
    def order(self) -> Tensor:
        """[T, E'] what selection orders by."""
        return self.probs if self.rank is None else self.rank


class Choice(NamedTuple):
    """What a select step decides: one of three tables.

    expert: [T, K] int64, -1 = none. unit: [G, E, C] int64, -1 = empty (expert choice). Neither: every expert.
    complete: a static promise that `expert` holds ids everywhere and never -1.
    """

    expert: Tensor | None = None
    unit: Tensor | None = None
    complete: bool = False


class Limited(NamedTuple):
    """What a limit step leaves. expert: [T, K]. kept: [T, K] bool. capacity: most rows of one expert, or None.
    chosen: [T, K] the choices before some were moved to other experts, or None where none are ever moved."""

    expert: Tensor
    kept: Tensor
    capacity: int | None = None
    chosen: Tensor | None = None


class Step(nn.Module):
    """Base of all steps. needs: signals it cannot do without. causal: unit t depends on units up to t only.
    A step whose state moves after an optimiser step has `step(counts [E] int64)`."""

    needs: tuple[str, ...] = ()
    causal: bool = True


class ScoreStep(Step):
    """`(x [T, D], signals, carry) -> (Scores, carry)` with logits and, if there is noise, extras. x is fp32 or fp64;
    parameters are cast to its dtype where they are used. Built as `(config, dim, num_ids)`."""

    role = "router"

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        raise NotImplementedError


class MixStep(Step):
    """`(Scores, x, signals, carry) -> (Scores, carry)`: changes `probs` (and `rank`) by looking at other units, at the
    preceding attention (`signals.attend`) or at what an earlier layer left in `carry.state`.
    Built as `(config, dim, num_ids)`. In cached decoding `carry.mine` is what the step kept at the pass before, or its
    `new_state`."""

    role = "router"

    def forward(self, scores: Scores, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        raise NotImplementedError

    def new_state(self, capacity: int) -> Any:
        """An empty state for cached decoding of at most `capacity` units per sequence; None = nothing is kept."""
        return None


class SelectStep(Step):
    """`(Scores, x, signals) -> Choice`. Built as `(config, num_experts, num_ids)`.

    makes: the type of plan. top_k: the most experts a unit can get (expert choice: the mean). ragged: whether it may
    give fewer. masks: whether it passes over ids that are not `allowed`. by_order: whether it takes the first k by
    `Scores.order`, so that a bias added to the order means something.
    """

    makes: str = "Plan"
    top_k: float = 1
    masks: bool = False
    ragged: bool = False
    by_order: bool = False

    def forward(self, scores: Scores, x: Tensor, signals: Signals) -> Choice:
        raise NotImplementedError


class WeighStep(Step):
    """`(Scores, expert [T, K]) -> weight [T, K]`, 0 where expert is -1. Built as `(config)`.

    `slots` says whether it can also be used for expert choice, where `of_slots(Scores, unit [G, E, C])` is called.
    `draws` says whether `drawn(Scores, expert, signals)` is called instead: weights are random in training.
    """

    slots: bool = False
    draws: bool = False

    def forward(self, scores: Scores, expert: Tensor) -> Tensor:
        raise NotImplementedError

    def of_slots(self, scores: Scores, unit: Tensor) -> Tensor:
        raise NotImplementedError

    def drawn(self, scores: Scores, expert: Tensor, signals: Signals) -> Tensor:
        raise NotImplementedError


class LimitStep(Step):
    """`(expert [T, K], kept or None, Scores, signals) -> Limited`. Built as `(config, num_experts, num_ids)`."""

    def forward(self, expert: Tensor, kept: Tensor | None, scores: Scores, signals: Signals) -> Limited:
        raise NotImplementedError


def unit_ids(signals: Signals, like: Tensor) -> Tensor:
    """[T] int64 numbers of the units in the global batch; 0..T-1 where the signals do not say."""
    if signals.unit_id is not None:
        return signals.unit_id
    return torch.arange(like.shape[0], device=like.device)
