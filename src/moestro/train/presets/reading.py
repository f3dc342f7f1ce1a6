"""Presets of readers: questions answered by a stretch of a context."""

from __future__ import annotations

from collections.abc import Callable

from ...models.config import Encoder
from ...models.expert_places import experts_on_top, gshard_layer
from ...nn.config import Attention, LayerNorm, PlainFeedForward
from ...optim.config import AdamW
from ...tasks.config import FindSpan, SpanQuestions
from ...tasks.data.config import SquadShifts
from ..config import TrainRun

__all__ = ["PRESETS"]


def _robust_qa_moe() -> TrainRun:
    """Span reader with experts on top and augmented questions (Robust QA); default: new Wikipedia of SQuADShifts."""
    encoder = Encoder(
        dim=96,
        num_layers=2,
        attention=Attention(num_heads=4, causal=False),
        ffn=PlainFeedForward(width=384, activation="gelu"),
        norm=LayerNorm(),
        dropout=0.1,
        context=256,
        init_std=None,
    )
    return TrainRun(
        model=experts_on_top(encoder, gshard_layer(num_experts=4, width=192)).replace(features=1),
        data=SpanQuestions(published=SquadShifts(), copies=4),
        objective=FindSpan(),
        optimizer=AdamW(lr=2e-3),
        steps=2000,
        batch_size=16,
        seq_len=192,
    )


PRESETS: dict[str, Callable[[], TrainRun]] = {"robust-qa-moe": _robust_qa_moe}
