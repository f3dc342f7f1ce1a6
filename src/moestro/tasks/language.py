"""The objective of language modelling."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor, nn

from ..core.signals import Signals
from ..core.trail import Trail
from .batches import Batch
from .config import NextToken

__all__ = ["NextTokenObjective", "Outcome"]


class Outcome(NamedTuple):
    """What one forward pass gives.

    loss: [] sum of nats over the counted targets, with gradient. count: [] int64, how many those are.
    trail: routing of all passes. metrics: further additive sums by name.
    """

    loss: Tensor
    count: Tensor
    trail: Trail
    metrics: dict[str, Tensor]


class NextTokenObjective:
    """The sum of -log p(next token) over a batch: one forward pass, nothing averaged."""

    def __init__(self, config: NextToken) -> None:
        self.config = config

    def count(self, batch: Batch) -> int:
        """How many targets a batch has, known before any forward pass."""
        return int((batch.targets >= 0).sum())

    def __call__(self, model: nn.Module, batch: Batch, signals: Signals) -> Outcome:
        loss, count, _, trail = model.loss(batch.tokens, batch.targets, with_places(batch, signals))  # type: ignore[operator]
        return Outcome(loss, count, trail, {})


def with_places(batch: Batch, signals: Signals) -> Signals:
    """The signals with the tokens and their numbers in the global batch, [T] each.

    Routed layers get positions and segments from the decoder. Attention must not: a segment means packed rows there,
    and costs the kernel its causal path.
    """
    return dataclasses.replace(signals, token=batch.tokens.reshape(-1), unit_id=batch.unit_id)
