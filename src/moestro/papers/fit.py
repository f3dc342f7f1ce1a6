"""The loop that comparisons train with: any model, any objective, one process, no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..core.draws import fold
from ..core.signals import Signals
from ..optim.clip import clip, grad_norm
from ..optim.config import AdamW, Optimizer
from ..optim.config import AfterStep as AfterStepConfig
from ..optim.hooks import AfterStep, RouterSteps
from ..optim.touched import settle
from ..train.knobs import Knob, knobs_at
from ..train.sweep import check_knobs
from ..train.terms import Reach, total
from .paper import Diverged, Job

__all__ = ["fit"]


def fit(
    model: nn.Module,
    objective: Callable[[Any, Any, Signals], Any],
    batches: Callable[[int], Any],
    job: Job,
    *,
    optimizer: Optimizer | None = None,
    after: Sequence[AfterStepConfig] = (),
    knobs: Sequence[Knob] = (),
    watch: Callable[[int, Any], None] | None = None,
) -> None:
    """Train `model` for `job.updates` steps at peak learning rate `job.lr`.

    objective: `(model, batch, signals)` -> what objectives of `tasks` return: sum of nats, count, trail; balance losses
    of the trail join with their coefficients. batches: step -> the batch of that step. optimizer: all but the learning
    rate. after: hooks after the step; routers that have a state move it in any case. knobs: schedules of call-time
    values of routers. watch: `(step, outcome)` before the step is taken.

    Raises `Diverged` (a `UserError`) where the loss or the gradient is not finite; the weights are those before it.
    """
    settings = (optimizer or AdamW()).replace(lr=job.lr)
    made = settings.build(model)
    check_knobs(knobs, model, job.updates)
    hooks: list[AfterStep] = [RouterSteps(model), *(hook.build(model, job.updates) for hook in after)]
    reach = Reach(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in range(job.updates):
        model.train()
        outcome = objective(model, batches(step), _signals(job, knobs, step))
        extra, _ = total(outcome.trail, reach)
        loss = outcome.loss / outcome.count + extra
        if watch is not None:
            watch(step, outcome)
        loss.backward()
        if step == 0:
            reach.check()
        settle(parameters)
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = float(grad_norm(grads))
        if not (math.isfinite(norm) and math.isfinite(float(loss.detach()))):
            raise Diverged(
                f"arm {job.arm.name}, seed {job.seed}, learning rate {job.lr:g}: the loss of update {step + 1} is not "
                "finite; leave the learning rate out of the grid, or clip harder"
            )
        clip(grads, norm, settings.clip)
        made.step(settings.schedule.factor(step, job.updates))
        made.clear()
        counts = outcome.trail.counts()
        for hook in hooks:
            hook(step, counts)
        job.tick(1)


def _signals(job: Job, knobs: Sequence[Knob], step: int) -> Signals:
    """As in runs: a seed of the step, how far training is, and the knobs' values."""
    seed = fold(fold(fold(job.seed, "draws"), step), 0)
    return Signals(seed=seed, progress=step / job.updates, knobs=knobs_at(knobs, step, job.updates))
