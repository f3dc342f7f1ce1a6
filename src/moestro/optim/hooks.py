"""What happens after the optimiser step: a list of hooks, called in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

__all__ = ["AfterStep", "RouterSteps"]


class AfterStep(Protocol):
    """`hook(step, counts)`, once per optimiser step.

    step: number of the step just taken, from 0. counts: path of a routed layer -> [E] int64, summed over passes,
    micro-batches and ranks.
    """

    def __call__(self, step: int, counts: Mapping[str, Tensor]) -> None: ...


class RouterSteps:
    """Moves the state of routers that have one (loss-free bias): `step(counts)` of the layer, or of its router."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, step: int, counts: Mapping[str, Tensor]) -> None:
        for path, count in counts.items():
            layer = self.model.get_submodule(path)
            for owner in (layer, getattr(layer, "router", None)):
                if hasattr(owner, "step"):
                    owner.step(count)  # type: ignore[union-attr]
                    break
