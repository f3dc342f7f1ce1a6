"""What all losses share: identity by config, and the readings of a plan that respect padding and virtual ids."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from ..core.errors import MissingSignalError, UserError
from ..core.plan import AnyPlan, num_units
from ..core.stats import Stats
from . import config as configs

__all__ = ["PlanLoss", "distribution", "logits", "need", "ratio", "real_distribution", "units"]

C = TypeVar("C", bound=configs.Loss)


class PlanLoss(Generic[C]):
    """Base of losses: `stats(plan, **tensors)` sums, `value(stats)` is the equation, calling does both.

    Two losses are equal when their configs are: they travel as static context of trails.
    """

    name: ClassVar[str]
    needs: tuple[str, ...] = ()

    def __init__(self, config: C) -> None:
        self.config: C = config

    @property
    def coefficient(self) -> float:
        return self.config.coefficient

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats:
        """Additive sums of one plan. `tensors` holds the signals named in `needs`, [T] each."""
        raise NotImplementedError

    def value(self, stats: Stats) -> Tensor:
        """The equation, [] in the dtype of the sums."""
        raise NotImplementedError

    def __call__(self, source: AnyPlan | Stats, **tensors: Tensor) -> Tensor:
        return self.value(source if isinstance(source, Stats) else self.stats(source, **tensors))

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, PlanLoss) and other.config == self.config

    def __hash__(self) -> int:
        return hash((type(self), self.config))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"


def need(loss: PlanLoss[Any], tensors: dict[str, Tensor], name: str) -> Tensor:
    """The tensor called `name`, or an error that says where it comes from."""
    if tensors.get(name) is None:
        raise MissingSignalError(f"{loss.name} needs the signal {name}; pass Signals({name}=...) to the layer")
    return tensors[name]


def units(plan: AnyPlan) -> Tensor:
    """[] int64: number of valid units."""
    if plan.valid is not None:
        return plan.valid.sum()
    return torch.full((), num_units(plan), dtype=torch.int64, device=plan.weight.device)


def logits(plan: AnyPlan, loss: PlanLoss[Any]) -> Tensor:
    """[T, E'] clean logits, 0 at padding (whose values, even NaN, reach neither value nor gradient)."""
    return _table(plan, "logits", loss)


def distribution(plan: AnyPlan, loss: PlanLoss[Any]) -> Tensor:
    """[T, E'] the units' distributions over all ids, each with sum 1, 0 at padding.

    Scores that are no distribution (sigmoid) are divided by their sum, as DeepSeek-V3 does in eq. 19.
    """
    return _normalise(_table(plan, "probs", loss))


def real_distribution(plan: AnyPlan, loss: PlanLoss[Any]) -> Tensor:
    """[T, E] the distributions given that the expert is real: virtual ids are cut off before dividing by the sum."""
    return _normalise(_table(plan, "probs", loss)[:, : plan.num_experts])


def ratio(sums: Tensor, count: Tensor) -> Tensor:
    """sums / count, and 0 where nothing was counted."""
    return sums / count.clamp_min(1)


def _table(plan: AnyPlan, name: str, loss: PlanLoss[Any]) -> Tensor:
    table = getattr(plan, name)
    if table is None:
        raise UserError(
            f"{loss.name} needs the router's {name}, and this plan has none (a router without scores, or a plan "
            f"that was slimmed); take {type(loss.config).__name__} out of the layer's losses, or keep {name!r}"
        )
    return table if plan.valid is None else torch.where(plan.valid[:, None], table, 0.0)


def _normalise(table: Tensor) -> Tensor:
    return table / table.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(table.dtype).tiny)
