"""What a routed part writes into the trail: counts, the slimmed plan, and the statistics of its losses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core.errors import UserError
from ..core.plan import AnyPlan, demand, load, slim
from ..core.protocols import Loss
from ..core.signals import Signals
from ..core.trail import Key, Record, Term, Trail
from ..losses.config import Loss as LossConfig

__all__ = ["build_losses", "note"]


def build_losses(configs: Sequence[LossConfig], where: str) -> tuple[Loss, ...]:
    """The losses, which must have different names: trails tell terms apart by them."""
    losses: tuple[Loss, ...] = tuple(c.build() for c in configs)
    names = [loss.name for loss in losses]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: the loss {name!r} is listed twice; keep one")
    return losses


def note(plan: AnyPlan, losses: Sequence[Loss], signals: Signals, training: bool, where: str) -> Trail:
    """The trail of one routed part, under the empty path.

    In evaluation a loss whose signals or scores are not there is left out (decoding gives no labels, a plan from a
    file has no probabilities); in training that is an error. Of a quiet pass in evaluation nothing
    is noted.
    """
    if signals.quiet and not training:
        return Trail()
    wanted, chosen = demand(plan), load(plan)
    terms: dict[str, Term] = {}
    for loss in losses:
        if not training and not _possible(plan, loss, signals):
            continue
        signals.require(loss.needs, by=f"the loss {loss.name!r} of {where}")
        tensors: dict[str, Tensor] = {n: getattr(signals, n) for n in loss.needs}
        terms[loss.name] = Term(stats=loss.stats(plan, **tensors), loss=loss)
    record = Record(
        plan=slim(plan, signals.keep), demand=wanted, load=chosen, dropped=(wanted - chosen).sum(), terms=terms
    )
    return Trail({Key("", 0): record})


def _possible(plan: AnyPlan, loss: Loss, signals: Signals) -> bool:
    scored = plan.probs is not None and plan.logits is not None
    return scored and all(getattr(signals, n) is not None for n in loss.needs)
