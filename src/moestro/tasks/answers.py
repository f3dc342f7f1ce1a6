"""How well a language model gives the answers of batches: loss, and which ones it would recite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..convert.change.samples import evaluating
from ..core.signals import Signals
from .data.batches import ExampleBatches
from .objectives import NextToken
from .probes import TaskLoss

__all__ = ["answer_loss"]


@torch.no_grad()
def answer_loss(model: nn.Module, batches: ExampleBatches, size: int = 128, signals: Signals | None = None) -> TaskLoss:
    """-log p(answer | prompt) of every example of batches that `AnswerTexts` collates, in evaluation mode.

    Unlike `probes.task_loss`, prompt and answer are tokenised apart, and the end of an answer is a token of it. size:
    examples of one pass.
    """
    objective: Any = NextToken().build()
    found: list[tuple[Tensor, ...]] = []
    with evaluating(model):
        for _, batch in batches.each(size):
            (said,), _ = objective.predict(model, batch.to(next(model.parameters()).device), signals or Signals())
            scores = said.logits.to(torch.promote_types(said.logits.dtype, torch.float32)).log_softmax(-1)
            counted = said.target >= 0
            nats = -scores.gather(-1, said.target.clamp_min(0)[:, None])[:, 0].double()
            right = (scores.argmax(-1) == said.target) & counted
            each = (torch.where(counted, nats, 0.0), counted.long(), right.long())
            found.append((*(t.view(batch.targets.shape).sum(1).cpu() for t in each), batch.answer_bytes.cpu()))
    nats, tokens, right, size_ = (torch.cat(parts) for parts in zip(*found))
    return TaskLoss(nats=nats, tokens=tokens, right=right, bytes=size_)
