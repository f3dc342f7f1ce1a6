"""Losses on the squared coefficient of variation over experts: importance and load (Shazeer et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.plan import AnyPlan, Dense, ExpertChoice, Plan, demand
from ..core.stats import Stats
from . import config as configs
from .base import PlanLoss, real_distribution

__all__ = ["ImportanceLoss", "LoadLoss", "cv_squared"]

_EPS = 1e-10


def cv_squared(sums: Tensor, unbiased: bool = False) -> Tensor:
    """Variance over experts divided by squared mean, of [E] sums; 0 when all are equal or nothing was summed.

    Without `unbiased` the variance is the population's, and the value when one expert takes all is E - 1; with it, E.
    """
    mean = sums.mean()
    square = ((sums - mean) ** 2).sum() / max(sums.shape[0] - int(unbiased), 1)
    return square / (mean**2 + _EPS)


class ImportanceLoss(PlanLoss[configs.ImportanceCV2]):
    """CV^2 of the experts' importances; importance_e = sum of the combine weights (or probabilities) given to e.

    Source: Shazeer et al. 2017, eq. 6-7; with of="probs", V-MoE. Weights of dropped choices are 0 and count nothing;
    virtual ids are no experts. Sums: importance [E].
    """

    name = "importance_loss"

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats:
        if self.config.of == "probs":
            return Stats({"importance": real_distribution(plan, self).sum(0)})
        return Stats({"importance": _weight_by_expert(plan)})

    def value(self, stats: Stats) -> Tensor:
        return cv_squared(stats["importance"], self.config.unbiased)


class LoadLoss(PlanLoss[configs.LoadCV2]):
    """CV^2 of the experts' smooth loads; load_e = sum over units of P(e among the k best if its noise is drawn anew).

    Source: Shazeer et al. 2017, eq. 8-11: P = Phi((logit_e - k-th best noisy logit of the others) / std_e).
    The router gives plan.extra["noisy_logits"] [T, E'] and plan.extra["noise_std"] (broadcastable to it). Without them
    (evaluation, or a router without noise) loads are counted choices, which have no gradient: the value is for the
    log, and a coefficient has nothing to act on. Only for `Plan`; k is the number of its columns.
    Sums: load [E], floating with noise and int64 without.
    """

    name = "load_loss"

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats:
        if not isinstance(plan, Plan):
            raise UserError(
                f"{self.name} has no meaning for {type(plan).__name__} routing, where units do not choose experts; "
                "take LoadCV2 out of the losses"
            )
        if plan.logits is None or not {"noisy_logits", "noise_std"} <= plan.extra.keys():
            return Stats({"load": demand(plan)})
        clean, noisy, std = plan.logits, plan.extra["noisy_logits"], plan.extra["noise_std"]
        if plan.valid is None:
            chance = _chance(clean, noisy, std, plan.expert.shape[1])
        else:  # padding is replaced on both sides: a NaN in it would reach the gradient through a product with 0
            valid = plan.valid[:, None]
            clean, noisy, std = (torch.where(valid, t, fill) for t, fill in ((clean, 0.0), (noisy, 0.0), (std, 1.0)))
            chance = torch.where(valid, _chance(clean, noisy, std, plan.expert.shape[1]), 0.0)
        return Stats({"load": chance[:, : plan.num_experts].sum(0)})

    def value(self, stats: Stats) -> Tensor:
        load = stats["load"]
        return cv_squared(load if load.is_floating_point() else load.to(torch.float32), self.config.unbiased)


def _weight_by_expert(plan: AnyPlan) -> Tensor:
    """[E] sum of the combine weights of each real expert."""
    if isinstance(plan, Dense):
        return torch.where(plan.routed(), plan.weight, 0.0).sum(0)
    weight = torch.where(plan.routed(), plan.weight, 0.0)
    if isinstance(plan, ExpertChoice):
        return weight.sum(dim=(0, 2))
    # one column at a time: no [T, K, E] table, and a sum in fixed order where a scatter's would be free
    ids = torch.arange(plan.num_experts, device=weight.device)
    total = weight.new_zeros(plan.num_experts)
    for column, expert in zip(weight.unbind(1), plan.expert.unbind(1), strict=True):
        total = total + torch.where(expert[:, None] == ids, column[:, None], 0.0).sum(0)
    return total


def _chance(clean: Tensor, noisy: Tensor, std: Tensor, k: int) -> Tensor:
    """[T, E'] probability that each id is among the k best when only its own noise is drawn again."""
    if k >= clean.shape[1]:
        return torch.ones_like(clean)
    best = torch.topk(noisy, k + 1, dim=-1).values
    inside, outside = best[:, k : k + 1], best[:, k - 1 : k]
    others = torch.where(noisy > inside, inside, outside)  # the k-th best of the others
    return torch.special.ndtr((clean - others) / std)
