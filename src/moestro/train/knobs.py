"""Configs of schedules of call-time knobs: values that routers take from the signals of a step. No torch.

t is the number of the step, from 0, T the number of steps; evaluations take the value at t = T. Values of top_k are
whole: what is added to one end is rounded, half to even (41, arXiv 2303.01610, and its code).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..core.config import Config, config
from ..core.errors import UserError

__all__ = ["CosineRamp", "ExponentialRamp", "Knob", "LinearRamp", "Ramp", "Staircase", "knobs_at"]


@config
class Knob(Config):
    """Base of schedules: one call-time value of all routers that read it, as a function of the step."""

    name: Literal["top_k", "top_p", "capacity_factor", "temperature", "mix_tau"] = "top_k"
    """What is changed."""

    def value(self, step: int, steps: int) -> float:
        """The value in step number `step` of `steps`; at `steps` itself, the last one."""
        raise NotImplementedError

    def mean(self, steps: int) -> float:
        """The mean value over a training: for top_k, experts per unit that were paid for."""
        return math.fsum(self.value(t, steps) for t in range(steps)) / steps

    def check_values(self, *values: float) -> None:
        """Raise `UserError` for values that this knob cannot have; for `__post_init__`."""
        for value in values:
            if not 0 < value < math.inf:
                raise UserError(f"{type(self).__name__}: {self.name} must be positive, found {value}")
            if self.name == "top_k" and value != int(value):
                raise UserError(f"{type(self).__name__}: top_k must be whole, found {value}")

    def whole(self, value: float) -> float:
        """Rounded half to even, where the knob is a number of experts."""
        return round(value) if self.name == "top_k" else value


@config
class Ramp(Knob):
    """Base of ways from one value to another, up or down."""

    start: float = 8.0
    """The first value."""
    end: float = 16.0
    """The last value."""

    def __post_init__(self) -> None:
        self.check_values(self.start, self.end)

    def between(self, value: float) -> float:
        """`value`, but not beyond either end."""
        value = min(max(value, min(self.start, self.end)), max(self.start, self.end))
        return int(value) if self.name == "top_k" else value


@config
class LinearRamp(Ramp):
    """start + (end - start) t / T: K from half of the experts to all of them in SMoE-Dropout."""

    def value(self, step: int, steps: int) -> float:
        return self.between(self.start + self.whole((self.end - self.start) * step / steps))


@config
class CosineRamp(Ramp):
    """end + (start - end) cos(pi t / 2T): slow at first."""

    def value(self, step: int, steps: int) -> float:
        return self.between(self.end + self.whole((self.start - self.end) * math.cos(math.pi * step / (2 * steps))))


@config
class ExponentialRamp(Ramp):
    """end + (start - end) 0.99^n, with n = 0..300 the whole part of 300 t / T: fast at first, and never quite there.

    The released code has n = t // (T // 300), which is the same where 300 divides T and fails below 300 steps.
    """

    def value(self, step: int, steps: int) -> float:
        return self.between(self.end + self.whole((self.start - self.end) * 0.99 ** (300 * step // steps)))


@config
class Staircase(Knob):
    """Several values, each for an equal share of the steps."""

    values: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    """The values in their order."""

    def __post_init__(self) -> None:
        if not self.values:
            raise UserError("Staircase.values is empty; give at least one")
        self.check_values(*self.values)

    def value(self, step: int, steps: int) -> float:
        return self.whole(self.values[min(len(self.values) * step // steps, len(self.values) - 1)])


def knobs_at(knobs: Sequence[Knob], step: int, steps: int) -> Mapping[str, Any]:
    """name -> value in step number `step`: what `Signals.knobs` takes."""
    return {knob.name: knob.value(step, steps) for knob in knobs}
