"""The routing of a probe batch: what two states of a model are compared on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..convert.change.samples import evaluating
from ..core.pytree import changed
from ..core.signals import Signals
from ..core.trail import Trail

__all__ = ["probe"]


@torch.no_grad()
def probe(model: nn.Module, *inputs: Tensor, signals: Signals | None = None) -> Trail:
    """The plans of one pass in evaluation, with probabilities and extras kept; the model is left as it was.

    inputs: what the model is called with before its signals: tokens [B, S], or source and target. For
    `trace.stability.sets` and `trace.spending.certainty`.
    """
    kept = changed(Signals() if signals is None else signals, keep=frozenset({"probs", "extra"}), quiet=False)
    run: Any = model
    with evaluating(model):
        return run(*inputs, kept)[-1]
