"""Objectives of translation, classification, span extraction and pairs of texts. All are sums over their targets."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.signals import Signals
from ..core.trail import Trail
from . import objectives as cfg
from .data.batches import LabelBatch, PairBatch, SpanBatch, TranslationBatch
from .predictions import Outcome, Prediction, nats, told

__all__ = ["ClassificationObjective", "PairObjective", "SpanObjective", "TranslationObjective"]


class _Predicting:
    """An objective that is a cross-entropy of logits. target: name of the batch's targets."""

    target: ClassVar[str]

    def __init__(self, config: Any) -> None:
        self.config = config

    def count(self, batch: Any) -> int:
        """How many targets a batch has, known before any forward pass."""
        return int((getattr(batch, self.target) >= 0).sum())

    def __call__(self, model: Any, batch: Any, signals: Signals) -> Outcome:
        predictions, trail = self.predict(model, batch, signals)
        loss, metrics = self.nats(predictions)
        return Outcome(loss, (getattr(batch, self.target) >= 0).sum(), trail, metrics)

    def predict(self, model: Any, batch: Any, signals: Signals) -> tuple[list[Prediction], Trail]:
        """Logits with their targets, from one forward pass."""
        raise NotImplementedError

    def nats(self, predictions: list[Prediction]) -> tuple[Tensor, dict[str, Tensor]]:
        """Their loss and metrics."""
        return nats(predictions, self.config.smoothing)


class TranslationObjective(_Predicting):
    """Nats of the target's tokens, of an `EncoderDecoder`. Without label smoothing no logits are held.

    Smoothing spreads its share over all V tokens (Szegedy et al. 2016); fairseq's spreads it over the V - 1 others.
    """

    target = "targets"

    def __call__(self, model: Any, batch: TranslationBatch, signals: Signals) -> Outcome:
        if self.config.smoothing:
            return super().__call__(model, batch, signals)
        here, there = _both(batch, signals)
        loss, count, _, trail = model.loss(batch.source, batch.tokens, batch.targets, here, None, there)
        return Outcome(loss, count, trail, {})

    def predict(self, model: Any, batch: TranslationBatch, signals: Signals) -> tuple[list[Prediction], Trail]:
        here, there = _both(batch, signals)
        logits, _, trail = model(batch.source, batch.tokens, here, None, there)
        return [Prediction(logits.flatten(0, 1), batch.targets.reshape(-1))], trail


def _both(batch: TranslationBatch, signals: Signals) -> tuple[Signals, Signals]:
    """Signals of the target's tokens and of the source's."""
    return (
        told(signals, batch.tokens, batch.unit_id, batch.valid, batch.domain),
        told(signals, batch.source, batch.source_unit_id, batch.source_valid, batch.domain),
    )


class ClassificationObjective(_Predicting):
    """Nats of the classes of texts, of an encoder with a `ClassHead`. labels of -1 do not count."""

    target = "labels"

    def predict(self, model: Any, batch: LabelBatch, signals: Signals) -> tuple[list[Prediction], Trail]:
        seen = told(signals, batch.tokens, batch.unit_id, batch.valid, batch.domain)
        logits, _, trail = model(batch.tokens, seen)
        return [Prediction(logits, batch.labels)], trail


class SpanObjective(_Predicting):
    """(nats of the answer's first token + nats of its last) / 2, among the tokens that are no padding, of an encoder
    with a `SpanHead`. Source: 13 (arXiv 2204.09598). A start of -1 does not count.

    A model with one feature per token is given whether the token occurs in the other part.
    """

    target = "start"

    def predict(self, model: Any, batch: SpanBatch, signals: Signals) -> tuple[list[Prediction], Trail]:
        seen = told(signals, batch.tokens, batch.unit_id, batch.valid, batch.domain)
        if model.config.features not in (0, 1):
            raise UserError(
                f"FindSpan: batches have 1 feature per token, the model {model.config.features}; set 0 or 1"
            )
        features = batch.matched[..., None].to(model.head.map.weight.dtype) if model.config.features else None
        said, _, trail = model(batch.tokens, seen, None, features)
        # A finite number: the KL of two passes subtracts these logits.
        wide = said.to(torch.promote_types(said.dtype, torch.float32))
        start, end = wide.masked_fill(~batch.valid[..., None], -1e9).unbind(-1)
        last = torch.where(batch.start >= 0, batch.end, -1)
        return [Prediction(start, batch.start, 0.5), Prediction(end, last, 0.5)], trail

    def nats(self, predictions: list[Prediction]) -> tuple[Tensor, dict[str, Tensor]]:
        return nats(predictions)


class PairObjective:
    """The loss of pairs of texts, summed over those that are similar, of an encoder with an `EmbeddingHead`.

    The second texts are pass 1 in the trail. Metrics: nats; correct, how many first texts are nearest to their own
    second text among those of their group.
    """

    def __init__(self, config: cfg.MatchPairs) -> None:
        self.config, self.loss = config, config.loss.build()
        self.together = config.group  # evaluations keep groups in one batch

    def count(self, batch: PairBatch) -> int:
        """How many similar pairs a batch has."""
        return int(batch.similar.sum())

    def __call__(self, model: Any, batch: PairBatch, signals: Signals) -> Outcome:
        B = batch.a.shape[0]
        n = self.config.group or B
        if B % n:
            raise UserError(f"MatchPairs: {B} pairs are no whole number of groups of {n}; change group or batch size")
        a, _, first = model(batch.a, told(signals, batch.a, batch.a_unit_id, batch.a_valid, batch.domain))
        b, _, second = model(batch.b, told(signals, batch.b, batch.b_unit_id, batch.b_valid, batch.domain))
        a, b = (t.unflatten(0, (B // n, n)) for t in (a, b))
        each = torch.where(batch.similar, self.loss(a, b).flatten(), 0.0)
        with torch.no_grad():
            nearest = (a @ b.mT).argmax(-1) == torch.arange(n, device=a.device)
            metrics = {"nats": each.detach().sum(), "correct": (nearest.flatten() & batch.similar).sum()}
        return Outcome(each.sum(), batch.similar.sum(), first | second.as_pass(1), metrics)
