"""Routing on one fixed batch at several moments of a training: how many choices change, and how certain they are."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import nn

from ..core.errors import UserError
from ..core.signals import Signals
from ..trace.spending import Certainty, certainty
from ..trace.stability import Sets, fluctuation_rate, sets

__all__ = ["RoutingProbe"]


class RoutingProbe:
    """`look()` at some moments, then `fluctuation()` (03, arXiv 2505.00792). The model is left as it was.

    batch: what the objective reads. signals: for that pass, such as knobs.
    """

    def __init__(self, model: nn.Module, objective: Any, batch: Any, signals: Signals | None = None) -> None:
        self.model, self.objective, self.batch = model, objective, batch
        self.signals = Signals() if signals is None else signals
        self.looks: list[dict[str, Sets]] = []

    @torch.no_grad()
    def look(self) -> dict[str, Certainty]:
        """Note every unit's set of experts; returns path -> entropies of the distributions."""
        training = self.model.training
        self.model.eval()
        keep = self.signals.keep | {"probs", "extra"}
        trail = self.objective(self.model, self.batch, dataclasses.replace(self.signals, keep=keep)).trail
        self.model.train(training)
        self.looks.append(sets(trail))
        return certainty(trail)

    def fluctuation(self) -> float:
        """Share of (unit, layer) pairs whose set of experts is another one at the next look, the mean over looks."""
        if len(self.looks) < 2:
            raise UserError(f"RoutingProbe: {len(self.looks)} looks; what changes shows between two")
        rates = [fluctuation_rate(a, b) for a, b in itertools.pairwise(self.looks)]
        return math.fsum(rates) / len(rates)
