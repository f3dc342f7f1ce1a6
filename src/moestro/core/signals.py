"""Signals: everything a router, expert or loss may look at besides x. Per-unit tensors are flat, [T] with T = B*S."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .draws import fold
from .errors import MissingSignalError
from .pytree import changed, pytree, static

__all__ = ["Signals"]


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Signals:
    """What is known about the units of this forward pass.

    Shapes ([T] unless said):
        valid: bool, False = padding. position: int64, place in its sequence. segment: int64, which sequence.
        token: int64 token ids. task, label: int64. unit_id: int64, the unit's number in the global batch: random draws
        use it, so one rank or many draw the same. condition: [T, C] or [B, C]. time: [T] or [B] diffusion time.
        places: position, segment and unit_id of the units, for routed layers where the above are missing; a model
        computes them once for all of its blocks.
        progress: share of training done, 0..1. seed: integer already folded with step, pass and module path.

    Static:
        rows: how many sequences of equal length the units are, one after the other; None = not said. Layers that are
        called with [B, S, D] say it themselves where their router asks.
        attend: the preceding attention as an operator, v [T, D] -> A v [T, D], or None.
        knobs: call-time values from schedules: top_k, top_p, capacity_factor, temperature, ... experts: "all" or a
        number, what every routed layer takes in place of its router's choice (`moe.asked`).
        keep: names of plan tensors ("probs", "logits", "extra") that must outlive the layer's losses.
        quiet: nobody reads the trail of this pass (generation): in evaluation layers leave it empty and count nothing.
    """

    valid: Tensor | None = None
    position: Tensor | None = None
    segment: Tensor | None = None
    token: Tensor | None = None
    task: Tensor | None = None
    label: Tensor | None = None
    condition: Tensor | None = None
    time: Tensor | None = None
    unit_id: Tensor | None = None
    places: Mapping[str, Tensor] | None = None
    progress: Tensor | float | None = None
    seed: Tensor | int = 0
    rows: int | None = static(default=None)
    attend: Callable[[Tensor], Tensor] | None = static(default=None)
    knobs: Mapping[str, Any] = static(default_factory=dict)
    keep: frozenset[str] = static(default=frozenset())
    quiet: bool = static(default=False)

    def at(self, name: str) -> Signals:
        """The signals for the child called `name`: the seed is folded with the name."""
        return changed(self, seed=fold(self.seed, name))

    def knob(self, name: str, default: Any) -> Any:
        """A call-time value, or the configured one."""
        return self.knobs.get(name, default)

    def labels(self) -> dict[str, Tensor]:
        """What plans keep for later analysis: task and label, where they are given."""
        if self.task is None and self.label is None:
            return {}
        return {n: t for n in ("task", "label") if (t := getattr(self, n)) is not None}

    def require(self, names: tuple[str, ...], by: str) -> None:
        """Raise `MissingSignalError` unless every named signal is there."""
        if not names:
            return
        missing = [n for n in names if getattr(self, n) is None]
        if missing:
            given = [f.name for f in dataclasses.fields(self) if isinstance(getattr(self, f.name), Tensor)]
            raise MissingSignalError(
                f"{by} needs the signal{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
                f"pass Signals({', '.join(f'{n}=...' for n in missing)}) (given: {', '.join(given) or 'none'})"
            )
