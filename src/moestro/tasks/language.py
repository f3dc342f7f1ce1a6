"""The objective of language modelling."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
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
    """The signals with what every router may want to know about the tokens of a batch, [T] each."""
    B, S = batch.tokens.shape
    device = batch.tokens.device
    return dataclasses.replace(
        signals,
        token=batch.tokens.reshape(-1),
        position=torch.arange(S, device=device).repeat(B),
        segment=torch.arange(B, device=device).repeat_interleave(S),
        unit_id=batch.unit_id,
    )
