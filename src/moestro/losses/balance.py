"""Balance losses of the form E * sum_e f_e P_e: over the batch, per unit, by first choices, and inside sequences.

Common to all: f counts what was chosen, before capacity, over real experts; P is the mean distribution over real
experts. The share that virtual ids (null, copy) take therefore neither raises nor lowers these losses: they balance
real experts among each other and leave the use of virtual ones to the task.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.plan import AnyPlan, Plan, demand
from ..core.stats import Stats
from . import config as configs
from .base import PlanLoss, need, ratio, real_distribution, units

__all__ = ["GShardBalanceLoss", "PerUnitBalanceLoss", "SequenceBalanceLoss", "SwitchBalanceLoss"]


class SwitchBalanceLoss(PlanLoss[configs.SwitchBalance]):
    """E * sum_e f_e P_e, f_e = share of all choices that fell on expert e, P_e = mean probability of e.

    Source: Switch Transformer eq. 4-6, for any K: f sums to 1, so the value is 1 when choices or probabilities are
    uniform and E when one expert takes everything (K = 1). With a variable K (top-p) f is still a share of choices;
    the published L_b of dynamic routing is this value times the mean K: `PerUnitBalance`.
    With a mix step before selection (03), `of` says which distribution P is the mean of; f is what was selected.
    Sums: demand [E] int64, probs [E], units [] int64.
    """

    name = "load_balancing_loss"

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats:
        return _counted(_chosen(plan, self), self)

    def value(self, stats: Stats) -> Tensor:
        return _product(ratio(stats["demand"].to(stats["probs"].dtype), stats["demand"].sum()), stats)


class PerUnitBalanceLoss(PlanLoss[configs.PerUnitBalance]):
    """E * sum_e F_e P_e, F_e = share of units that chose expert e; F sums to the mean K, so uniform gives mean K.

    Source: load_balancing_loss_func of transformers' Mixtral; L_b of "Harder Tasks Need More Experts".
    Sums: demand [E] int64, probs [E], units [] int64.
    """

    name = "load_balancing_loss_per_unit"

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats:
        return _counted(_chosen(plan, self), self)

    def value(self, stats: Stats) -> Tensor:
        return _product(ratio(stats["demand"].to(stats["probs"].dtype), stats["units"]), stats)


class GShardBalanceLoss(PlanLoss[configs.GShardBalance]):
    """E * sum_e c_e P_e, c_e = share of the units' first choices that fell on expert e.

    Source: GShard algorithm 1, whose 1/E * sum_e is this divided by E^2 (so that uniform gives 1 here). Differs from
    `SwitchBalance` from K = 2 on: second choices are not counted. Units whose first choice is virtual or absent are
    not counted in c. Sums: first [E] int64, probs [E], units [] int64.
    """

    name = "gshard_loss"

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats:
        table = _chosen(plan, self)
        first = demand(dataclasses.replace(table, expert=table.expert[:, :1]))
        return Stats({"first": first, "probs": real_distribution(table, self).sum(0), "units": units(table)})

    def value(self, stats: Stats) -> Tensor:
        return _product(ratio(stats["first"].to(stats["probs"].dtype), stats["first"].sum()), stats)


class SequenceBalanceLoss(PlanLoss[configs.SequenceBalance]):
    """The mean over sequences of sum_e f_e P_e, f_e = E / (K T) * choices of e, both taken inside one sequence.

    Source: DeepSeek-V3 eq. 17-20 (expert-level balance of DeepSeek-V2). 1 when every sequence is uniform, E when every
    sequence has one expert of its own (K = 1), although the batch as a whole may then be uniform. With
    of="first" f counts first choices: the loss of 13 (arXiv 2204.09598), the mean over sequences of E * sum_e F_e P_e.
    A sequence must lie in one plan: cut into two micro-batches it counts as two sequences. Needs segment [T] int64,
    any ids. Sums: value [] over sequences, sequences [] int64.
    """

    name = "sequence_balance_loss"
    needs = ("segment",)

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats:
        table = _chosen(plan, self)
        probs = real_distribution(table, self)
        valid = torch.ones_like(table.expert[:, 0], dtype=torch.bool) if table.valid is None else table.valid
        order, lengths = _by_sequence(need(self, tensors, "segment"), valid)
        total = _sum_by(probs, order, lengths)  # [T, E], one row per sequence, zeros after the last
        if self.config.of == "first":
            table = dataclasses.replace(table, expert=table.expert[:, :1])
        hits = _sum_by(_hits(table, probs.dtype), order, lengths)
        number = _sum_by(valid.to(probs.dtype)[:, None], order, lengths)
        share = hits / hits.sum(-1, keepdim=True).clamp_min(1)
        value = table.num_experts * (share * total / number.clamp_min(1)).sum()
        return Stats({"value": value, "sequences": (number > 0).sum()})

    def value(self, stats: Stats) -> Tensor:
        return ratio(stats["value"], stats["sequences"])


def _counted(plan: Plan, loss: PlanLoss[Any]) -> Stats:
    if loss.config.of == "unmixed" and "unmixed_probs" in plan.extra:
        plan = dataclasses.replace(plan, probs=plan.extra["unmixed_probs"])
    return Stats({"demand": demand(plan), "probs": real_distribution(plan, loss).sum(0), "units": units(plan)})


def _product(share: Tensor, stats: Stats) -> Tensor:
    mean = ratio(stats["probs"], stats["units"])
    return mean.shape[0] * (share * mean).sum()


def _chosen(plan: AnyPlan, loss: PlanLoss[Any]) -> Plan:
    if not isinstance(plan, Plan):
        raise UserError(
            f"{loss.name} has no meaning for {type(plan).__name__} routing, where the experts' loads are equal by "
            f"construction and the value would be a constant; take {type(loss.config).__name__} out of the losses"
        )
    return plan


def _hits(plan: Plan, dtype: torch.dtype) -> Tensor:
    """[T, E] how often each unit chose each real expert."""
    counted = plan.active() & (plan.expert < plan.num_experts)
    table = torch.zeros(plan.expert.shape[0], plan.num_experts + 1, dtype=dtype, device=plan.expert.device)
    slot = torch.where(counted, plan.expert, plan.num_experts)
    return table.scatter_add_(1, slot, torch.ones_like(slot, dtype=dtype))[:, :-1]


def _by_sequence(segment: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """([T] units sorted by segment, [T] length of each sequence, then zeros), of static shape for compiled code.

    Padding keeps the segment it was given, whatever that is: a sequence of padding only has no valid unit.
    """
    order = torch.sort(segment, stable=True).indices
    ascending = segment[order]
    new = torch.ones_like(ascending)
    new[1:] = (ascending[1:] != ascending[:-1]).to(new.dtype)
    lengths = torch.zeros_like(segment).scatter_add_(0, new.cumsum(0) - 1, torch.ones_like(segment))
    return order, lengths


def _sum_by(table: Tensor, order: Tensor, lengths: Tensor) -> Tensor:
    """[T, N] sums of the rows of each sequence, added in the order of units: the same bits on every run."""
    rows = torch.gather(table, 0, order[:, None].expand_as(table))
    # unsafe = without reading the lengths back from the device; they are right by construction
    return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, initial=0, unsafe=True)
