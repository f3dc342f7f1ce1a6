"""Losses on the router's logits and distributions: z-loss, entropy, two kinds of information, and named experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.plan import AnyPlan
from ..core.stats import Stats
from . import config as configs
from .base import PlanLoss, distribution, logits, need, ratio, real_distribution, units

__all__ = ["MutualInformationLoss", "RoutingEntropyLoss", "SpecifiedExpertLoss", "TokenInformationLoss", "ZLossTerm"]


class ZLossTerm(PlanLoss[configs.ZLoss]):
    """Mean over units of (log sum_e exp logit_e)^2, over all ids, virtual ones included.

    Source: ST-MoE eq. 5. Sums: square [], units [] int64.
    """

    name = "z_loss"

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats:
        square = torch.logsumexp(logits(plan, self), dim=-1) ** 2
        if plan.valid is not None:
            square = torch.where(plan.valid, square, 0.0)
        return Stats({"square": square.sum(), "units": units(plan)})

    def value(self, stats: Stats) -> Tensor:
        return ratio(stats["square"], stats["units"])


class RoutingEntropyLoss(PlanLoss[configs.RoutingEntropy]):
    """Mean over units of -sum_e p_e log p_e, nats, over all ids: log E' for flat distributions, 0 for certain ones.

    Source: L_d of "Harder Tasks Need More Experts". The value is the entropy itself: a positive coefficient lowers it.
    Sums: entropy [], units [] int64.
    """

    name = "routing_entropy"

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats:
        return Stats({"entropy": _entropy(distribution(plan, self)).sum(), "units": units(plan)})

    def value(self, stats: Stats) -> Tensor:
        return ratio(stats["entropy"], stats["units"])


class TokenInformationLoss(PlanLoss[configs.TokenInformation]):
    """-I(unit; expert) = mean entropy of the units - entropy of their mean distribution, nats; from -log E to 0.

    Minimised by units that are certain and experts that are used equally. Over real experts only.
    Source: the token-level form of Mod-Squad's loss (regularised information maximisation, Krause et al. 2010).
    Sums: probs [E], entropy [], units [] int64.
    """

    name = "token_information_loss"

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats:
        probs = real_distribution(plan, self)
        return Stats({"probs": probs.sum(0), "entropy": _entropy(probs).sum(), "units": units(plan)})

    def value(self, stats: Stats) -> Tensor:
        return ratio(stats["entropy"], stats["units"]) - _entropy(ratio(stats["probs"], stats["units"]))


class MutualInformationLoss(PlanLoss[configs.MutualInformation]):
    """-I(task; expert), nats, with p(e | task) = mean distribution of the task's units; from -log min(M, E) to 0.

    Source: Mod-Squad (Chen et al. 2022), where every task weighs the same (prior="uniform"; tasks without a unit
    weigh nothing).
    Needs task [T] int64 in 0..num_tasks-1; units of task -1 are left out. Over real experts only.
    Sums: joint [M, E], units [M] int64.
    """

    name = "mutual_information_loss"
    needs = ("task",)

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats:
        task, M = need(self, tensors, "task"), self.config.num_tasks
        if task.device.type == "cpu" and not torch.compiler.is_compiling() and task.numel() and int(task.max()) >= M:
            raise UserError(
                f"{self.name}: task {int(task.max())} with num_tasks={M}; set num_tasks to the number of tasks"
            )
        probs = real_distribution(plan, self)
        belongs = task[:, None] == torch.arange(M, device=task.device)  # [T, M]
        if plan.valid is not None:
            belongs = belongs & plan.valid[:, None]
        with torch.autocast(probs.device.type, enabled=False):
            joint = belongs.to(probs.dtype).T @ probs
        return Stats({"joint": joint, "units": belongs.sum(0)})

    def value(self, stats: Stats) -> Tensor:
        conditional = ratio(stats["joint"], stats["units"][:, None])  # p(e | task)
        weight = stats["units"] if self.config.prior == "counts" else (stats["units"] > 0)
        prior = (weight.to(conditional.dtype) / weight.sum().clamp_min(1))[:, None]
        marginal = (prior * conditional).sum(0)
        return (prior[:, 0] * _entropy(conditional)).sum() - _entropy(marginal)


class SpecifiedExpertLoss(PlanLoss[configs.SpecifiedExpert]):
    """Mean over units of -log softmax(logits)_e with e the expert that the unit's signal names, nats; over all ids.

    Units of -1 are left out. Source: expert loss of 34 (arXiv 2401.15713), first version, which takes the mean of the
    logits over layers first: the layers' terms with a coefficient divided by their number bound that from above.
    Needs the signal, [T] int64. Sums: nats [], units [] int64.
    """

    name = "specified_expert_loss"

    def __init__(self, config: configs.SpecifiedExpert) -> None:
        super().__init__(config)
        self.needs = (config.signal,)

    def stats(self, plan: AnyPlan, **tensors: Tensor) -> Stats:
        signal = self.config.signal
        wanted, table = need(self, tensors, signal), logits(plan, self)
        ids = table.shape[1]
        look = wanted.device.type == "cpu" and not torch.compiler.is_compiling() and wanted.numel() > 0
        if look and int(wanted.max()) >= ids:
            raise UserError(f"{self.name}: signals.{signal} names expert {int(wanted.max())} of {ids}; 0..{ids - 1}")
        counted = wanted >= 0
        if plan.valid is not None:
            counted = counted & plan.valid
        chosen = torch.log_softmax(table, dim=-1).gather(1, wanted.clamp_min(0)[:, None])[:, 0]
        return Stats({"nats": -torch.where(counted, chosen, 0.0).sum(), "units": counted.sum()})

    def value(self, stats: Stats) -> Tensor:
        return ratio(stats["nats"], stats["units"])


def _entropy(probs: Tensor) -> Tensor:
    """Entropy over the last axis, nats; probabilities of 0 add nothing and have a finite gradient."""
    return -(probs * torch.log(probs.clamp_min(torch.finfo(probs.dtype).tiny))).sum(-1)
