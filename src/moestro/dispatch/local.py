"""The dropless local exchange: rows stay where they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.carry import Forecast
from ..core.plan import AnyPlan
from ..core.rows import Rows
from .base import mixture
from .config import Local

__all__ = ["Attribute", "LocalExchange"]


class Attribute:
    """The bank that a module holds under a name, looked up at every call.

    Exchanges are plain objects around a bank, not modules: they add nothing to parameter names. Looking the bank up
    lets adapters and sharding put another one in its place, and deep copies refer to the copied module.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner = owner
        self.name = name

    def __call__(
        self, rows: Tensor, index: Rows, context: Any = None, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        return getattr(self.owner, self.name)(rows, index, context, weights)

    def mixture(
        self, units: Tensor, plan: AnyPlan, context: Any = None, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        return mixture(getattr(self.owner, self.name), units, plan, context, weights)


class LocalExchange:
    """Hands rows to the bank as they are, and units with their plan too. `prepare` has nothing to prepare.

    Shapes: rows [R, *unit] -> [R, *unit']; `mixture`: units [T, *unit] -> [T, *unit'].
    """

    def __init__(self, config: Local, inner: Any) -> None:
        self.config = config
        self.inner = inner

    def prepare(self, plan: AnyPlan | Forecast) -> None:
        pass

    def __call__(
        self, rows: Tensor, index: Rows, context: Any = None, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        return self.inner(rows, index, context, weights)

    def mixture(
        self, units: Tensor, plan: AnyPlan, context: Any = None, weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        return mixture(self.inner, units, plan, context, weights)
