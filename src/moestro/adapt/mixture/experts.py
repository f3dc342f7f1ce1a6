"""A bank of LoRA experts: low-rank maps, of which a unit meets those that a plan says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.account import Cost
from ...core.params import ParamInfo
from ...core.plan import AnyPlan, Dense, Plan
from ...core.rows import Rows
from ...core.signals import Signals
from ...experts.bank import Bank, scaled
from ..draws import Place, drop, unit_ids
from ..lora.factors import draw, low_rank

__all__ = ["LoRAExperts"]


class LoRAExperts(Bank):
    """Expert e is scale * B_e A_e dropout(x). Shapes: a [E, r, I], b [E, O, r]; rows [R, I] -> [R, O].

    A mixture multiplies units with the factors of all experts, side by side, and puts the weights of the plan between
    the two products: E r numbers per unit take the place of a row per choice. A unit has one dropout mask for all of
    its experts, drawn from the seed and unit ids of `context` where that is `Signals`.
    """

    takes_signals = True

    def __init__(
        self,
        inputs: int,
        outputs: int,
        num_experts: int,
        rank: int,
        *,
        scale: float = 2.0,
        dropout: float = 0.0,
        seed: int = 0,
        path: str = "",
        like: Tensor | None = None,
    ) -> None:
        super().__init__(inputs, num_experts)
        self.outputs, self.rank, self.scale, self.dropout = outputs, rank, scale, dropout
        self.place = Place(seed, path)
        kind: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
        self.a = nn.Parameter(torch.zeros(num_experts, rank, inputs, **kind))
        self.b = nn.Parameter(torch.zeros(num_experts, outputs, rank, **kind))
        draw(self.a, seed, f"{path}.a")

    def forward(
        self, rows: Tensor, index: Rows, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        p = self.values(weights)
        ids = self._ids(context, index.num_units, rows).index_select(0, index.unit.clamp_min(0))
        return scaled(self.scale * low_rank(self._dropped(rows, context, ids), p["a"], p["b"], index.offsets), index)

    def mixture(
        self, units: Tensor, plan: AnyPlan, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """y [T, O] of units [T, I] under a plan."""
        table = _table(plan)
        if table is None:
            return super().mixture(units, plan, context, weights)
        p = self.values(weights)
        x = self._dropped(units, context, self._ids(context, units.shape[0], units))
        inner = F.linear(x, p["a"].flatten(0, 1))
        weight = (self.scale * table).to(inner.dtype)[:, :, None]
        inner = (inner.unflatten(1, (self.num_experts, self.rank)) * weight).flatten(1)
        return F.linear(inner, p["b"].transpose(0, 1).flatten(1))

    def _ids(self, context: Any, T: int, like: Tensor) -> Tensor:
        return unit_ids(context if isinstance(context, Signals) else None, T, like.device)

    def _dropped(self, x: Tensor, context: Any, ids: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return x
        signals = context if isinstance(context, Signals) else None
        return drop(x, self.dropout, self.place, signals, "x", ids)

    def cost(self, seq_len: int = 1) -> Cost:
        """Active parameters are those of the experts that a unit meets; FLOPs are what a mixture computes: all."""
        total, flops = self.per_row()
        return Cost(total, round(total * self.met / self.num_experts), flops)

    def param_info(self) -> dict[str, ParamInfo]:
        return {
            "a": ParamInfo(role=self.role, expert_axis=0, matrix_axes=(1, 2)),
            "b": ParamInfo(role=self.role, expert_axis=0, matrix_axes=(1, 2), init_std=0.0),
        }

    def extra_repr(self) -> str:
        return f"inputs={self.dim}, outputs={self.outputs}, num_experts={self.num_experts}, rank={self.rank}"


def _table(plan: AnyPlan) -> Tensor | None:
    """[T, E] the weight of every expert for every unit, 0 where it was not chosen; None for experts that choose."""
    if isinstance(plan, Dense):
        return plan.weight
    if not isinstance(plan, Plan):
        return None
    experts = torch.arange(plan.num_experts, device=plan.expert.device)
    chosen = plan.expert[:, :, None] == experts
    return torch.where(chosen, plan.weight[:, :, None], 0.0).sum(1)
