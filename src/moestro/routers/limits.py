"""Configs of limits: what happens when an expert is chosen too often, and who is served first. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import config
from ..core.errors import UserError
from .bases import Limit, Priority

__all__ = [
    "BatchPrioritised",
    "ByPosition",
    "ByProbability",
    "Capacity",
    "FirstChoices",
    "FixedCapacity",
    "RandomSecond",
    "Recycle",
]


@config
class ByPosition(Priority):
    """Earlier units first, with all their choices. The one causal policy."""

    builds: ClassVar[str] = "moestro.routers.priority:PositionPriority"


@config
class FirstChoices(Priority):
    """All first choices before all second choices, each in the order of units (GShard)."""

    builds: ClassVar[str] = "moestro.routers.priority:FirstChoicesPriority"


@config
class ByProbability(Priority):
    """Choices of higher probability first."""

    builds: ClassVar[str] = "moestro.routers.priority:ProbabilityPriority"


@config
class BatchPrioritised(Priority):
    """First choices first, units in the order of their highest probability (V-MoE's batch-prioritised routing)."""

    builds: ClassVar[str] = "moestro.routers.priority:BatchPrioritisedPriority"


@config
class Recycle(Priority):
    """Like another policy, but choices that find no room go to random experts that have some (Hunyuan-Large)."""

    builds: ClassVar[str] = "moestro.routers.priority:RecyclePriority"
    order: Priority = FirstChoices()
    """Who is served first."""

    def __post_init__(self) -> None:
        if isinstance(self.order, Recycle):
            raise UserError("Recycle.order: recycling inside recycling has no meaning; name another policy")


@config
class Capacity(Limit):
    """An expert takes at most max(min_capacity, ceil(factor * K * valid units / experts)) choices.

    Call-time knob: capacity_factor.
    """

    builds: ClassVar[str] = "moestro.routers.limit:CapacityLimit"
    factor: float = 1.25
    """Room over an even load, in training."""
    eval_factor: float | None = None
    """The same in evaluation; None = as in training."""
    min_capacity: int = 4
    """Room that every expert has."""
    priority: Priority = ByPosition()
    """Who is served first, and what happens to the others."""
    per: Literal["batch", "segment"] = "batch"
    """Units that share the room: the whole batch, or each segment."""
    rounding: Literal["up", "down"] = "up"
    """Where factor * K * units / experts is no whole number; "down" as in much released code."""

    def __post_init__(self) -> None:
        self.positive("factor")
        self.positive("eval_factor")
        if self.min_capacity < 0:
            raise UserError(f"Capacity.min_capacity: {self.min_capacity} is negative")


@config
class FixedCapacity(Limit):
    """An expert takes at most `size` choices, however many units there are.

    Call-time knob: capacity_factor, which gives it at least the room that Capacity would.
    """

    builds: ClassVar[str] = "moestro.routers.limit:FixedCapacityLimit"
    size: int = 64
    """The most choices of an expert."""
    priority: Priority = ByPosition()
    """Who is served first, and what happens to the others."""
    per: Literal["batch", "segment"] = "segment"
    """Units that share the room: the whole batch, or each segment."""

    def __post_init__(self) -> None:
        self.positive("size")


@config
class RandomSecond(Limit):
    """The second of two choices is kept with probability share / threshold, share = p2 / (p1 + p2) (GShard)."""

    builds: ClassVar[str] = "moestro.routers.limit:RandomSecondLimit"
    threshold: float = 0.5
    """Share from which the second choice is always kept: 0.5 in GShard, 0.2 in later reimplementations."""
    when: Literal["train", "always"] = "always"
    """When to drop at random; otherwise every second choice is kept."""
    then: Limit | None = None
    """A limit for what is left."""

    def __post_init__(self) -> None:
        self.positive("threshold")
