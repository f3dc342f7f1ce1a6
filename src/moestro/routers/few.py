"""The common router on few units without a gradient: the steps of `StepRouter` in one call of `ops.few.route`."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..core.plan import Plan
from ..core.signals import Signals
from ..ops import few
from . import config as cfg
from .score import LinearScore
from .select import TopKSelect

__all__ = ["Common", "common", "of_few"]

_WEIGHTS = {cfg.Raw: "raw", cfg.Renormalised: "renormalised", cfg.SoftmaxKept: "kept"}


class Common(NamedTuple):
    """A router of linear scores, top-k and one of three weights, with nothing between them."""

    k: int
    weigh: str
    scale: float


def common(config: cfg.Router) -> Common | None:
    """What `of_few` must know of such a router; None for every other."""
    weigh = config.weigh
    if type(config.score) is not cfg.Linear or type(config.select) is not cfg.TopK or type(weigh) not in _WEIGHTS:
        return None
    if config.score.deterministic:
        return None
    if isinstance(weigh, cfg.Renormalised) and (weigh.epsilon or weigh.floor):
        return None
    if config.mix is not None or config.limit is not None or config.subset is not None or config.temperature != 1.0:
        return None
    return Common(config.select.k, _WEIGHTS[type(weigh)], weigh.scale)  # type: ignore[attr-defined]


def of_few(router: Any, known: Common, x: Tensor, signals: Signals) -> Plan | None:
    """The plan that the steps of a `StepRouter` would make, or None where they must be asked: many units, a gradient,
    padding, call-time knobs, steps that were exchanged or are watched."""
    if signals.valid is not None or signals.knobs:
        return None
    score, select, weigh = router.score, router.select, router.weigh
    if type(score) is not LinearScore or type(select) is not TopKSelect:
        return None
    for step in (score, select, weigh):
        if step._forward_hooks or step._forward_pre_hooks:
            return None
    activation = router.config.activation
    made = few.route(x, score.weight, score.bias, known.k, activation, known.weigh, known.scale)  # type: ignore[arg-type]
    if made is None:
        return None
    virtual = router.virtual
    return Plan(
        expert=made.expert,
        weight=made.weight,
        num_experts=router.num_experts,
        probs=made.probs,
        logits=made.logits,
        meta=signals.labels(),
        virtual=virtual,
        complete=not virtual,
    )
