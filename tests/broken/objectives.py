"""Objectives that look right on one batch and are wrong on its parts."""

from __future__ import annotations

from moestro.core.trail import Trail
from moestro.tasks.config import NextToken
from moestro.tasks.language import NextTokenObjective


class MeanOfTokens(NextTokenObjective):
    """A mean: parts of unequal size weigh the same."""

    def __init__(self) -> None:
        super().__init__(NextToken())

    def __call__(self, model, batch, signals):
        outcome = super().__call__(model, batch, signals)
        return outcome._replace(loss=outcome.loss / outcome.count)


class LosesTheTrail(MeanOfTokens):
    """Routing is not handed on, so balance losses never reach the total."""

    def __call__(self, model, batch, signals):
        return NextTokenObjective.__call__(self, model, batch, signals)._replace(trail=Trail())


class CountsPadding(MeanOfTokens):
    """Promises all positions, whether they have a target or not."""

    def count(self, batch):
        return batch.targets.numel()

    def __call__(self, model, batch, signals):
        return NextTokenObjective.__call__(self, model, batch, signals)
