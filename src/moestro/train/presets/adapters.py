"""Presets that put adapters on given weights."""

from __future__ import annotations

from collections.abc import Callable

from ...adapt.config import Mixture, ShapedAllocation
from ...models.config import Decoder
from ...nn.config import Attention, FeedForward
from ...optim.config import AdamW, Cosine
from ..config import TrainRun

__all__ = ["PRESETS"]


def _mola() -> TrainRun:
    """MoLA: mixtures of LoRA experts, most of them in upper layers, on weights that are there (--start FOLDER)."""
    return TrainRun(
        model=Decoder(dim=64, num_layers=8, attention=Attention(num_heads=4), ffn=FeedForward(width=176)),
        adapters=Mixture(
            targets=("attention", "ffn"),
            allocation=ShapedAllocation(shape="triangle-down", top_k=2, rank=8),
            alpha=16.0,
            dropout=0.05,
        ),
        twin=False,
        optimizer=AdamW(lr=3e-3, weight_decay=0.0, schedule=Cosine(warmup=0.1)),
        steps=600,
        batch_size=32,
        seq_len=128,
    )


PRESETS: dict[str, Callable[[], TrainRun]] = {"mola": _mola}
