"""How much the predictions of a model depend on what its routers draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..core.draws import fold
from ..core.errors import UserError
from ..core.signals import Signals
from ..losses.consistency import symmetric_kl
from ..serve.loop import evaluating
from .predictions import Prediction, nats

__all__ = ["Draws", "over_draws"]


class Draws(NamedTuple):
    """nats: [n] per target, one for each draw. apart: [n - 1], nats per target between each draw and the next."""

    nats: tuple[float, ...]
    apart: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the nats over draws."""
        return math.fsum(self.nats) / len(self.nats)

    @property
    def spread(self) -> float:
        """Sample standard deviation of the nats over draws; 0 for one draw."""
        return math.sqrt(math.fsum((x - self.mean) ** 2 for x in self.nats) / max(1, len(self.nats) - 1))

    @property
    def distance(self) -> float:
        """Mean of `apart`; 0 for one draw."""
        return math.fsum(self.apart) / max(1, len(self.apart))


@torch.no_grad()
def over_draws(
    model: Any,
    objective: Any,
    batches: Iterable[Any],
    draws: Sequence[int],
    knobs: Mapping[str, Any] | None = None,
) -> Draws:
    """Evaluate the same batches once per draw: nats per target (no label smoothing), and [KL(p||q) + KL(q||p)] / 2 per
    target between the predictions p, q of two draws that follow each other (THOR, arXiv 2110.04260).

    objective: one that is built and predicts (`predict`, `count`), or two passes of such. draws: seeds, at least one;
    every batch draws apart. knobs: call-time values of routers, such as {"experts": "all"}, with which nothing is drawn
    where all routers obey. The model is evaluated in evaluation mode and afterwards as it was.

    Raises `UserError` without draws or targets.
    """
    objective = getattr(objective, "inner", objective)
    said, far, count = [0.0] * len(draws), [0.0] * max(0, len(draws) - 1), 0
    with evaluating(model):
        for number, batch in enumerate(batches):
            count += objective.count(batch)
            last: Any = None
            for i, draw in enumerate(draws):
                signals = Signals(seed=fold(fold(draw, "draws"), number), knobs=knobs or {})
                made, _ = objective.predict(model, batch, signals)
                said[i] += float(nats(made)[0])
                if last is not None:
                    far[i - 1] += sum(_apart(p, q) for p, q in zip(last, made, strict=True))
                last = made
    if not draws or not count:
        raise UserError(f"over_draws: {len(draws)} draws over {count} targets; give at least one of each")
    return Draws(tuple(x / count for x in said), tuple(x / count for x in far))


def _apart(p: Prediction, q: Prediction) -> float:
    return float(symmetric_kl(p.logits, q.logits, p.target >= 0)) * p.weight
