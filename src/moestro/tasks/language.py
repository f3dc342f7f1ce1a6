"""The objective of language modelling."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.signals import Signals
from ..core.trail import Trail
from .batches import Batch
from .objectives import NextToken
from .predictions import Outcome, Prediction, nats, told

__all__ = ["NextTokenObjective", "Outcome", "mean_nats", "with_places"]


class NextTokenObjective:
    """The sum of -log p(next token) over a batch: one forward pass, nothing averaged."""

    def __init__(self, config: NextToken) -> None:
        self.config = config

    def count(self, batch: Batch) -> int:
        """How many targets a batch has, known before any forward pass."""
        return int((batch.targets >= 0).sum())

    def __call__(self, model: Any, batch: Batch, signals: Signals) -> Outcome:
        loss, count, _, trail = model.loss(batch.tokens, batch.targets, with_places(batch, signals))
        return Outcome(loss, count, trail, {})

    def predict(self, model: Any, batch: Batch, signals: Signals) -> tuple[list[Prediction], Trail]:
        """All logits with their targets."""
        logits, _, trail = model(batch.tokens, with_places(batch, signals))
        return [Prediction(logits.flatten(0, 1), batch.targets.reshape(-1))], trail

    def nats(self, predictions: list[Prediction]) -> tuple[Tensor, dict[str, Tensor]]:
        """Their loss and metrics."""
        return nats(predictions)


def with_places(batch: Batch, signals: Signals) -> Signals:
    """The signals with what the batch says of its tokens: `predictions.told`."""
    more = (getattr(batch, name, None) for name in ("valid", "domain"))
    return told(signals, batch.tokens, batch.unit_id, *more)


@torch.no_grad()
def mean_nats(model: Any, batches: Iterable[Batch]) -> float:
    """Nats per target of a language model, or several as one, over batches, in evaluation mode.

    Raises `UserError` where there is no target.
    """
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        loss, targets, *_ = model.loss(batch.tokens, batch.targets, with_places(batch, Signals(quiet=True)))
        total, count = total + float(loss), count + int(targets)
    if not count:
        raise UserError("no text to measure the loss on: the held-out part is empty, or shorter than a window")
    return total / count
