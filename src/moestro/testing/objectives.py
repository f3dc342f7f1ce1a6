"""`check_objective`: what must hold for whatever turns models and a batch into a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..core.plan import num_units
from ..core.signals import Signals
from ..core.trail import add_stats
from .compare import assert_close

__all__ = ["check_objective"]


def check_objective(objective: Any, model: nn.Module, whole: Any, parts: Sequence[Any]) -> None:
    """The loss of a batch is a sum, so that micro-batches and ranks can be added up.

    whole: a batch. parts: the same batch, cut into pieces of unequal size. Checked: one finite loss with a gradient;
    the promised count; loss, count, gradient, routing statistics and demand of the parts add up to those of the whole;
    every routed layer is in the trail, with all units of each of its passes; two calls agree to the last bit.
    """
    model.train()
    signals = Signals(seed=3, progress=0.5)
    outcome = objective(model, whole, signals)
    if outcome.loss.ndim or not bool(torch.isfinite(outcome.loss.detach())) or not outcome.loss.requires_grad:
        raise AssertionError("loss: must be one finite number with a gradient")
    if outcome.count.dtype != torch.int64 or int(outcome.count) != objective.count(whole):
        raise AssertionError(f"count: {int(outcome.count)} targets, but count() promised {objective.count(whole)}")
    again = objective(model, whole, signals)
    if not torch.equal(again.loss, outcome.loss):
        raise AssertionError("two calls with one seed give different losses")
    _check_trail(model, outcome)
    _check_sums(objective, model, outcome, parts, signals)


def _check_trail(model: nn.Module, outcome: Any) -> None:
    routed = {
        path for path, module in model.named_modules() if hasattr(module, "router") and hasattr(module, "experts")
    }
    missing = routed - {key.path for key in outcome.trail}
    if missing:
        raise AssertionError(f"trail: {', '.join(sorted(missing))} left no record; its losses are lost")
    for key, plan in outcome.trail.plans().items():
        if not num_units(plan):
            raise AssertionError(f"trail: the plan of {key.path} in pass {key.pass_} speaks of no unit")


def _gradients(model: nn.Module, loss: Any) -> dict[str, torch.Tensor]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named, found)}


def _check_sums(objective: Any, model: nn.Module, outcome: Any, parts: Sequence[Any], signals: Signals) -> None:
    each = [objective(model, part, signals) for part in parts]
    if int(outcome.count) != sum(int(e.count) for e in each):
        raise AssertionError("count: the parts have another number of targets than the whole")
    assert_close("loss: sum over the parts", torch.stack([e.loss for e in each]).sum(), outcome.loss, tol=1e-5)
    want = _gradients(model, outcome.loss)
    got = {name: torch.zeros_like(g) for name, g in want.items()}
    for e in each:
        for name, gradient in _gradients(model, e.loss).items():
            got[name] += gradient
    noise = 1e-5 * float(torch.stack([g.norm() for g in want.values()]).max())
    for name, gradient in want.items():
        what = f"gradient of {name}: sum over the parts"
        if float(gradient.norm()) <= noise:  # zero but for rounding, such as that of a bias that all logits share
            assert_close(what, got[name].norm().clamp_min(10 * noise), torch.as_tensor(10 * noise))
        else:
            assert_close(what, got[name], gradient, tol=1e-4)
    counts = outcome.trail.counts()
    for path, count in counts.items():
        total = sum(e.trail.counts()[path] for e in each)
        if not torch.equal(torch.as_tensor(total), count):
            raise AssertionError(f"demand of {path}: the parts do not add up to the whole")
    whole_stats = {key: term.stats for key, term in outcome.trail.terms().items()}
    for key, stats in add_stats({k: t.stats for k, t in e.trail.terms().items()} for e in each).items():
        for name, value in stats.sums.items():
            assert_close(f"{key.name} of {key.path}: {name} over the parts", value, whole_stats[key][name], tol=1e-4)
