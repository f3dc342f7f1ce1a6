"""What a reader answers: texts for questions, their scores by domain, and which experts met which domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..core.signals import Signals
from ..trace.independence import usage_by_label
from ..trace.tables import Array
from .data.batches import ExampleBatches
from .data.examples import SpanQuestion
from .data.vocabulary import TextVocabulary
from .data.windows import SpanWindows, Window
from .metrics.spans import SpanScores, best_spans, span_scores
from .objectives import FindSpan

__all__ = ["Answers", "answer", "scores_by_domain"]


class Answers(NamedTuple):
    """texts: one per question. usage: path of a routed layer -> [domains, experts] int64, choices by the tokens of each
    domain. nats: mean of the objective over windows."""

    texts: list[str]
    usage: dict[str, Array]
    nats: float


@torch.no_grad()
def answer(
    model: nn.Module,
    questions: Sequence[SpanQuestion],
    windows: Sequence[Window],
    vocabulary: TextVocabulary,
    *,
    batch_size: int = 64,
    seed: int = 0,
    as_released: bool = False,
) -> Answers:
    """Answers of an encoder with a span head (`models.config.Headed`) to questions that were cut into `windows`.

    seed: of routers that draw in evaluation too. as_released: see `metrics.spans.best_spans`. The model is left in the
    mode it was in.
    """
    objective, training = FindSpan().build(), model.training
    model.eval()
    batches = ExampleBatches(windows, SpanWindows(vocabulary))
    domains = 1 + max((q.domain for q in questions), default=0)
    start: list[np.ndarray] = []
    end: list[np.ndarray] = []
    usage: dict[str, Array] = {}
    nats = 0.0
    try:
        for numbers, batch in batches.each(batch_size):
            signals = Signals(seed=seed + int(numbers[0]), progress=1.0)
            said, trail = objective.predict(model, batch, signals)
            nats += float(objective.nats(said)[0])
            for found, prediction in zip((start, end), said):
                found += list(prediction.logits.float().cpu().numpy())
            labels = batch.domain[:, None].expand(batch.tokens.shape).reshape(-1).numpy()
            for path, counts in usage_by_label(trail, labels, domains).items():
                usage[path] = usage[path] + counts if path in usage else counts
    finally:
        model.train(training)
    texts = best_spans(questions, windows, start, end, as_released=as_released)
    return Answers(texts, usage, nats / max(1, len(windows)))


def scores_by_domain(questions: Sequence[SpanQuestion], texts: Sequence[str]) -> dict[int, SpanScores]:
    """Domain -> exact match and F1 of its questions. An answer counts by the best of its question's."""
    out: dict[int, SpanScores] = {}
    for domain in sorted({q.domain for q in questions}):
        rows = [i for i, q in enumerate(questions) if q.domain == domain]
        out[domain] = span_scores([texts[i] for i in rows], [[a.text for a in questions[i].answers] for i in rows])
    return out
