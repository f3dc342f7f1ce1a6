"""Rows from a plan, as registered ops (`moestro::rows_of_choices`, `rows_of_units`, `rows_of_all`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.plan import AnyPlan, ExpertChoice, Plan
from ...core.rows import Rows
from . import host

__all__ = ["rows"]

Tables = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # unit, slot, expert, offsets, inverse, source

_RETURNS = "(Tensor unit, Tensor slot, Tensor expert, Tensor offsets, Tensor inverse, Tensor source)"
_LIBRARY = torch.library.Library("moestro", "FRAGMENT")
_LIBRARY.define(
    f"rows_of_choices(Tensor expert, Tensor? kept, Tensor? valid, int num_experts, bool complete) -> {_RETURNS}"
)
_LIBRARY.define(f"rows_of_units(Tensor unit, Tensor? valid, int num_units) -> {_RETURNS}")
_LIBRARY.define(f"rows_of_all(Tensor weight, Tensor? valid) -> {_RETURNS}")


def rows(plan: AnyPlan) -> Rows:
    """The rows of a plan: one per choice that reaches a real expert, sorted by expert, then unit.

    Padding, dropped, virtual and absent choices make no row. R is T*K without looking at data where the plan is
    `complete`. `inverse` is [T, K] for a Plan, [T, Kmax] for ExpertChoice (Kmax: the most experts that chose one unit)
    and [T, E] for Dense. `source` points into the flattened weight table of the plan.
    """
    if isinstance(plan, Plan):
        tables = torch.ops.moestro.rows_of_choices(plan.expert, plan.kept, plan.valid, plan.num_experts, plan.complete)
        units = plan.expert.shape[0]
    elif isinstance(plan, ExpertChoice):
        tables = torch.ops.moestro.rows_of_units(plan.unit, plan.valid, plan.num_units)
        units = plan.num_units
    else:
        tables = torch.ops.moestro.rows_of_all(plan.weight.detach(), plan.valid)
        units = plan.weight.shape[0]
    unit, slot, expert, offsets, inverse, source = tables
    return Rows(
        unit=unit,
        slot=slot,
        expert=expert,
        offsets=offsets,
        inverse=inverse,
        source=source,
        num_experts=plan.num_experts,
        num_units=units,
        capacity=plan.capacity if isinstance(plan, Plan) else None,
    )


def _offsets(expert: Tensor, num_experts: int) -> Tensor:
    """[E+1] from the experts of all rows, in any order."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert.device)
    return counts.scatter_add_(0, expert + 1, torch.ones_like(expert)).cumsum_(0)


def _choices(expert: Tensor, kept: Tensor | None, valid: Tensor | None, num_experts: int, complete: bool) -> Tables:
    T, K = expert.shape
    flat = expert.reshape(-1)
    narrow = torch.int16 if num_experts < 2**15 else torch.int32  # fewer passes of a radix sort
    if complete:
        source = torch.sort(flat.to(narrow), stable=True).indices
        R = T * K
    else:
        rows = (expert >= 0) & (expert < num_experts)
        if kept is not None:
            rows &= kept
        if valid is not None:
            rows &= valid[:, None]
        key = torch.where(rows.reshape(-1), flat, num_experts).to(narrow)
        R = int(rows.sum())
        source = torch.sort(key, stable=True).indices[:R].clone()
    sorted_expert = flat.index_select(0, source)
    inverse = torch.full((T * K,), -1, dtype=torch.int64, device=expert.device)
    inverse[source] = torch.arange(R, device=expert.device)
    unit = source // max(K, 1)
    return unit, source - unit * K, sorted_expert, _offsets(sorted_expert, num_experts), inverse.view(T, K), source


def _units(unit: Tensor, valid: Tensor | None, num_units: int) -> Tables:
    E = unit.shape[1]
    rows = unit >= 0
    if valid is not None and valid.numel():
        rows &= valid[unit.clamp_min(0)]
    group, expert, place = found = rows.nonzero(as_tuple=True)
    source = (group * E + expert) * unit.shape[2] + place
    chosen = unit[found]
    order = torch.sort(expert * num_units + chosen, stable=True).indices
    chosen, expert, source = chosen[order], expert[order], source[order]
    # A row's slot is its rank among the rows of the same unit.
    by_unit = torch.sort(chosen, stable=True).indices
    first = _offsets(chosen, num_units)
    R = chosen.shape[0]
    slot = torch.empty_like(chosen)
    slot[by_unit] = torch.arange(R, device=unit.device) - first[chosen[by_unit]]
    K = int(slot.max()) + 1 if R else 0
    inverse = torch.full((num_units, K), -1, dtype=torch.int64, device=unit.device)
    inverse[chosen, slot] = torch.arange(R, device=unit.device)
    return chosen, slot, expert, _offsets(expert, E), inverse, source


def _all(weight: Tensor, valid: Tensor | None) -> Tables:
    T, E = weight.shape
    units = torch.arange(T, device=weight.device) if valid is None else valid.nonzero()[:, 0]
    n = units.shape[0]
    experts = torch.arange(E, device=weight.device)
    unit = units.repeat(E)
    expert = experts.repeat_interleave(n)
    inverse = torch.full((T, E), -1, dtype=torch.int64, device=weight.device)
    inverse[units] = experts * n + torch.arange(n, device=weight.device)[:, None]
    offsets = torch.arange(E + 1, device=weight.device) * n
    return unit, expert.clone(), expert, offsets, inverse, unit * E + expert


_LIBRARY.impl("rows_of_choices", host.choices, "CPU")
_LIBRARY.impl("rows_of_choices", _choices, "CompositeExplicitAutograd")
_LIBRARY.impl("rows_of_units", _units, "CompositeExplicitAutograd")
_LIBRARY.impl("rows_of_all", _all, "CompositeExplicitAutograd")


def _fake(like: Tensor, R: int | torch.SymInt, T: int | torch.SymInt, K: int | torch.SymInt, E: int) -> Tables:
    def new(*shape: int | torch.SymInt) -> Tensor:
        return like.new_empty(shape, dtype=torch.int64)

    return new(R), new(R), new(R), new(E + 1), new(T, K), new(R)


@torch.library.register_fake("moestro::rows_of_choices")
def _(expert: Tensor, kept: Tensor | None, valid: Tensor | None, num_experts: int, complete: bool) -> Tables:
    T, K = expert.shape
    R = T * K if complete else torch.library.get_ctx().new_dynamic_size()
    return _fake(expert, R, T, K, num_experts)


@torch.library.register_fake("moestro::rows_of_units")
def _(unit: Tensor, valid: Tensor | None, num_units: int) -> Tables:
    ctx = torch.library.get_ctx()
    return _fake(unit, ctx.new_dynamic_size(), num_units, ctx.new_dynamic_size(), unit.shape[1])


@torch.library.register_fake("moestro::rows_of_all")
def _(weight: Tensor, valid: Tensor | None) -> Tables:
    T, E = weight.shape
    R = T * E if valid is None else torch.library.get_ctx().new_dynamic_size()
    return _fake(weight, R, T, E, E)
