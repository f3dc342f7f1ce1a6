"""Two passes over a batch that are kept alike: THOR's training, and R-Drop where dropout alone tells them apart."""

from __future__ import annotations

from typing import Any

import torch

from ..core.draws import fold
from ..core.pytree import changed
from ..core.signals import Signals
from ..losses.consistency import symmetric_kl
from .objectives import TwoPass
from .predictions import Outcome

__all__ = ["TwoPassObjective"]


class TwoPassObjective:
    """nats(pass 0) + nats(pass 1) + alpha * sum over targets of [KL(p||q) + KL(q||p)] / 2.

    The second pass has draws of its own (dropout, random experts, noise): its seed is folded with "pass.1", that of the
    first is as given; the trail numbers them. The gradient goes through both passes. `count` is that of one pass. Terms
    of both passes' trails join the loss as they do for one. In evaluation there is one pass, the inner objective's.
    Metrics: those of the inner objective over both passes; consistency, without alpha.

    Source: THOR (arXiv 2110.04260), with the sums of its code; with one expert this is R-Drop (arXiv 2106.14448).
    """

    def __init__(self, config: TwoPass) -> None:
        self.config, self.inner = config, config.inner.build()

    def count(self, batch: Any) -> int:
        """How many targets a batch has, known before any forward pass."""
        return self.inner.count(batch)

    def __call__(self, model: Any, batch: Any, signals: Signals) -> Outcome:
        if not model.training:
            return self.inner(model, batch, signals)
        first, trail = self.inner.predict(model, batch, signals)
        again = changed(signals, seed=fold(signals.seed, "pass.1"))
        second, left = self.inner.predict(model, batch, again)
        (one, metrics), (two, more) = self.inner.nats(first), self.inner.nats(second)
        pairs = zip(first, second, strict=True)
        kl = torch.stack([symmetric_kl(p.logits, q.logits, p.target >= 0) * p.weight for p, q in pairs]).sum()
        metrics = {name: value + more[name] for name, value in metrics.items()} | {"consistency": kl.detach()}
        count = (first[0].target >= 0).sum()
        return Outcome(one + two + self.config.alpha * kl, count, trail | left.as_pass(1), metrics)
