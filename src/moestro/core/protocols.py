"""The contracts that parts meet in: Router, Experts and Exchange, Loss. Structural types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from .plan import AnyPlan
from .rows import Rows

if TYPE_CHECKING:
    from .carry import Carry, Forecast
    from .signals import Signals
    from .stats import Stats

__all__ = ["Exchange", "Experts", "Loss", "Router"]


@runtime_checkable
class Router(Protocol):
    """`(x [T, D], signals, carry) -> (plan, carry)`.

    causal: whether the plan of unit t depends on units up to t only. num_experts: E. A router whose state moves after
    an optimiser step has `step(counts [E] int64)`.
    """

    causal: bool
    num_experts: int

    def __call__(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[AnyPlan, Carry]: ...


@runtime_checkable
class Experts(Protocol):
    """`(rows [R, *unit], index, context, weights) -> rows [R, *unit']`, rows sorted by expert as `index` says.

    context: what is not aligned with rows (keys, masks, conditioning). weights: name -> tensor in place of the bank's
    own parameters (gathered, paged or replicated); nobody else reads parameters.

    Experts and exchanges may also have `mixture(units [T, *unit], plan, context, weights) -> y [T, *unit']`: gather,
    experts and combine in one, equal to `ops.combine.through`, which stands in for those that have none.
    """

    def __call__(
        self, rows: Tensor, index: Rows, context: Any = None, weights: dict[str, Tensor] | None = None
    ) -> Tensor: ...


@runtime_checkable
class Exchange(Experts, Protocol):
    """Carries rows to experts and back. It has the call of `Experts`, so exchanges nest by wrapping.

    `prepare` is called as soon as a plan or forecast exists: prefetch starts there.
    """

    def prepare(self, plan: AnyPlan | Forecast) -> None: ...


class Loss(Protocol):
    """One published equation, as a function of additive statistics of a plan.

    `loss(source, **tensors)` accepts a plan or its `Stats`. needs: names of the signals it wants as tensors.
    """

    name: str
    coefficient: float
    needs: tuple[str, ...]

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats: ...

    def value(self, stats: Stats) -> Tensor: ...

    def __call__(self, source: AnyPlan | Stats, **tensors: Tensor) -> Tensor: ...
