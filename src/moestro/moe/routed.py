"""What everything with a router of its own has in common: the layer and the composers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..routers.router import StepRouter

__all__ = ["Routed"]


class Routed(nn.Module):
    """Base of modules with a `router` (None = every expert, equally)."""

    router: Any

    @property
    def causal(self) -> bool:
        """Whether what comes out for a unit depends on units up to it only."""
        return bool(getattr(self.router, "causal", True))

    @property
    def moves(self) -> bool:
        """Whether the router has a state that `step` moves (loss-free bias)."""
        parts = self.router.modules() if isinstance(self.router, nn.Module) else ()
        return any(hasattr(part, "step") for part in parts if not isinstance(part, StepRouter))

    def step(self, counts: Tensor) -> None:
        """Move the router's state, if it has one, by the demand of one optimiser step. counts: [E] int64, all ranks."""
        if hasattr(self.router, "step"):
            self.router.step(counts)
