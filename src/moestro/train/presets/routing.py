"""Presets of language models whose routers look further than a token, or are not trained."""

from __future__ import annotations

from collections.abc import Callable

from ...experts.config import MLP, Gated
from ...models.config import Decoder
from ...moe.config import MoELayer
from ...nn.config import Attention
from ...optim.config import AdamW
from ...routers.config import Frozen, Linear, Router, SimilarityMix, SoftmaxKept, TopK
from ..config import LinearRamp, TrainRun

__all__ = ["PRESETS"]


def _similarity() -> TrainRun:
    """Similarity-aware routing: a token's choice is averaged with those of earlier tokens that are like it.

    For attention in place of similarity: model.moe.router.mix = AttentionMix().
    """
    return TrainRun(
        model=Decoder(
            dim=128,
            num_layers=4,
            attention=Attention(num_heads=4),
            moe=MoELayer(
                num_experts=8,
                router=Router(mix=SimilarityMix(), select=TopK(k=2)),
                experts=Gated(width=128),
            ),
            init_std=None,
        ),
        optimizer=AdamW(lr=4e-3),
        steps=1500,
    )


def _smoe_dropout() -> TrainRun:
    """SMoE-Dropout: 16 experts behind a frozen random router, 8 at a time at first, all at the end.

    What comes out is good with any number of them: the knob top_k. The published combine is a plain mean (scale 1);
    times the root of their number, small experts begin as loud as the dense layer that they stand for.
    """
    return TrainRun(
        model=Decoder(
            dim=128,
            num_layers=4,
            attention=Attention(num_heads=4),
            moe=MoELayer(
                num_experts=16,
                router=Router(
                    score=Frozen(inner=Linear(bias=True, init_std=0.02)),
                    select=TopK(k=16),
                    weigh=SoftmaxKept(scale=4.0),
                ),
                experts=MLP(width=32, activation="relu", bias=True),
                losses=(),
            ),
            init_std=None,
        ),
        optimizer=AdamW(lr=4e-3),
        knobs=(LinearRamp(start=8, end=16),),
        steps=2000,
    )


PRESETS: dict[str, Callable[[], TrainRun]] = {
    "similarity-attention-aware-smoe": _similarity,
    "smoe-dropout": _smoe_dropout,
}
