"""Scores of a model on held-out data, outside of runs: bits per byte by domain, share of right answers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..core.signals import Signals
from .data.batches import ExampleBatches
from .data.streams import DomainBatches
from .predictions import told

__all__ = ["domain_bits", "share_right"]


@torch.no_grad()
def domain_bits(
    model: nn.Module,
    data: DomainBatches,
    split: str = "valid",
    limit: int | None = 32,
    signals: Signals | None = None,
    size: int = 16,
) -> dict[str, float]:
    """Name of a domain -> nats of its windows / ln 2 / the bytes of text that they stand for, in evaluation mode.

    limit: most windows of a domain, evenly spaced. signals: with knobs, such as another number of experts, or a seed.
    size: windows of one forward pass. Domains without a window are left out.
    """
    signals, training, found = Signals() if signals is None else signals, model.training, {}
    model.eval()
    for number, name in enumerate(data.data.domains):
        nats = size_of = 0.0
        for batch in data.held_out(number, size, split, limit):
            seen = told(signals, batch.tokens, batch.unit_id, domain=batch.domain)
            nats += float(model.loss(batch.tokens, batch.targets, seen)[0])  # type: ignore[operator]
            size_of += batch.text_bytes
        if size_of:
            found[name] = nats / math.log(2) / size_of
    model.train(training)
    return found


@torch.no_grad()
def share_right(
    model: nn.Module, objective: Any, data: ExampleBatches, signals: Signals | None = None, size: int = 256
) -> float:
    """Share of examples whose metric "correct" the objective counts (classes, spans, pairs), in evaluation mode.

    size: examples of one forward pass; they are as wide as the longest of them.
    """
    signals, training = Signals() if signals is None else signals, model.training
    model.eval()
    right = count = 0
    for _, batch in data.each(size):
        right += int(objective(model, batch, signals).metrics["correct"])
        count += objective.count(batch)
    model.train(training)
    return right / count
