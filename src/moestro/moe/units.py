"""Units and tokens: flattening, masking padding, and handing a unit's plan to its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.plan import AnyPlan, Plan, num_units
from ..core.rows import Rows
from ..ops.combine import table_weight
from ..ops.rows import rows

__all__ = ["all_to_one", "check_fit", "flatten", "masked", "pooled", "to_tokens"]


def flatten(x: Tensor, unit_axes: int, what: str = "the layer") -> tuple[Tensor, torch.Size]:
    """[..., *unit] -> ([T, *unit], the leading shape)."""
    if x.ndim < unit_axes:
        raise UserError(f"{what}: x has shape {list(x.shape)}, but a unit has {unit_axes} axes")
    lead = x.shape[: x.ndim - unit_axes]
    return x.reshape(lead.numel(), *x.shape[x.ndim - unit_axes :]), lead


def masked(x: Tensor, valid: Tensor | None) -> Tensor:
    """x [T, *u] with zeros at padding, whose values (even NaN) then reach neither output nor gradient."""
    if valid is None:
        return x
    if valid.shape != x.shape[:1] or valid.dtype != torch.bool:
        raise UserError(
            f"valid must be flat, one bool per unit: [{x.shape[0]}], not {list(valid.shape)} "
            f"{str(valid.dtype).removeprefix('torch.')}"
        )
    return x.masked_fill(~valid.view(-1, *[1] * (x.ndim - 1)), 0)


def pooled(units: Tensor, what: str) -> Tensor:
    """[T, D] for the router: the units themselves, or the mean over the inner axis of [T, S, D]."""
    if units.ndim == 2:
        return units
    if units.ndim == 3:
        return units.mean(dim=1)
    raise UserError(f"{what}: units of shape {list(units.shape[1:])} need router_input [T, D] for the router to read")


def all_to_one(T: int, device: torch.device) -> Rows:
    """The index of a bank of one expert that every unit meets. Nothing is sorted."""
    unit = torch.arange(T, device=device)
    zero = torch.zeros_like(unit)
    return Rows(
        unit=unit,
        slot=zero,
        expert=zero,
        offsets=torch.arange(2, device=device) * T,
        inverse=unit[:, None],
        source=unit,
        num_experts=1,
        num_units=T,
    )


class _Follow(torch.autograd.Function):
    """weight [U, K] -> [N, K], the weights of every token's owner; -1 = zeros. Gradients add in the order of tokens."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, owner: Tensor) -> Tensor:
        ctx.save_for_backward(owner)
        ctx.units = weight.shape[0]
        return weight.index_select(0, owner.clamp_min(0)).masked_fill(owner[:, None] < 0, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (owner,) = ctx.saved_tensors
        U = ctx.units
        last = torch.where(owner >= 0, owner, U)
        order = torch.sort(last, stable=True).indices
        lengths = torch.zeros(U + 1, dtype=torch.int64, device=owner.device)
        lengths.scatter_add_(0, last, torch.ones_like(last))
        sums = torch.segment_reduce(grads[0].index_select(0, order), "sum", lengths=lengths, axis=0, unsafe=True)
        return sums[:U], None


def to_tokens(plan: AnyPlan, valid: Tensor | None) -> Plan:
    """The plan of the tokens of units that own several: every token follows its unit.

    plan.owner: [N] token -> unit, -1 = none. valid: [N] bool, the tokens' own padding. Shapes: table [U, K] -> [N, K].
    """
    owner = plan.owner
    assert owner is not None
    if owner.numel() and num_units(plan) == 0:
        raise UserError("the plan has tokens with owners but no units")
    known = owner.clamp_min(0)
    here = owner >= 0 if valid is None else (owner >= 0) & valid
    if plan.valid is not None:
        here = here & plan.valid[known]
    if isinstance(plan, Plan):
        expert, weight, kept, virtual = plan.expert, plan.weight, plan.kept, plan.virtual
    else:
        index = rows(plan)
        expert = torch.full_like(index.inverse, -1)
        expert[index.unit, index.slot] = index.expert
        weight, kept, virtual = table_weight(plan, index), None, ()
    followed = _Follow.apply(weight, torch.where(here, owner, -1))
    assert isinstance(followed, Tensor)
    return Plan(
        expert=torch.where(here[:, None], expert[known], -1),
        weight=followed,
        num_experts=plan.num_experts,
        kept=None if kept is None else kept[known],
        valid=here,
        virtual=virtual,
    )


def check_fit(plan: AnyPlan, T: int, num_experts: int, what: str) -> None:
    """Raise `UserError` unless the plan is about T units (or tokens with owners) and this many experts."""
    found = num_units(plan) if plan.owner is None else plan.owner.shape[0]
    if found != T:
        raise UserError(f"{what}: the plan is about {found} units, x has {T}; give the plan that belongs to this input")
    if plan.num_experts != num_experts:
        raise UserError(f"{what}: the plan is about {plan.num_experts} experts, the layer has {num_experts}")
