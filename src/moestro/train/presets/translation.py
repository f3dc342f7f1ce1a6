"""Presets of translation."""

from __future__ import annotations

import math
from collections.abc import Callable

from ...experts.config import MLP
from ...losses.config import Loss
from ...models.config import Decoder, Encoder, EncoderDecoder
from ...moe.config import MoELayer
from ...nn.config import Attention, CrossAttention, LayerNorm, PlainFeedForward, Sinusoidal
from ...optim.config import AdamW, Cosine
from ...routers.config import Constant, Random, Router, Uniform
from ...tasks.config import Translate, Translations, TwoPass
from ...tasks.data.config import BpeVocabulary
from ..config import TrainRun

__all__ = ["PRESETS", "thor_model", "thor_router"]


def thor_router(as_released: bool = False) -> Router:
    """One expert per layer and batch in training, per layer and sentence in translation, drawn uniformly (THOR)."""
    select = Random(level="batch", evaluation="sequence", as_released=as_released)
    return Router(score=Uniform(), select=select, weigh=Constant())


def thor_model(
    num_experts: int,
    router: Router | None = None,
    losses: tuple[Loss, ...] = (),
    *,
    dim: int = 128,
    width: int = 256,
    num_heads: int = 4,
    num_layers: int = 2,
    vocab_size: int = 4096,
    context: int = 128,
    dropout: float = 0.1,
) -> EncoderDecoder:
    """fairseq's post-norm Transformer with experts in place of layers 0, 2, 4, ... on both sides (THOR); with one
    expert, the dense model. router: default `thor_router()`. Initial values: matrices and the shared embedding normal
    with 1 / sqrt(dim), each expert drawn for itself."""
    moe = MoELayer(
        num_experts=num_experts,
        router=router or thor_router(),
        experts=MLP(width=width, activation="relu", bias=True),
        losses=losses,
    )
    kinds = tuple("dense" if i % 2 or num_experts == 1 else "moe" for i in range(num_layers))
    attention = Attention(num_heads=num_heads, bias="all", positions=None)
    sides = {
        "vocab_size": vocab_size,
        "dim": dim,
        "num_layers": num_layers,
        "ffn": PlainFeedForward(width=width, activation="relu", bias=True),
        "moe": moe if "moe" in kinds else None,
        "layout": kinds,
        "norm": LayerNorm(),
        "norm_order": "post",
        "embedding_scale": math.sqrt(dim),
        "positions": Sinusoidal(),
        "dropout": dropout,
        "context": context,
        "init_std": dim**-0.5,
        "init_depth_scaled": False,
    }
    return EncoderDecoder(
        encoder=Encoder(attention=attention.replace(causal=False), **sides),
        decoder=Decoder(attention=attention, cross=CrossAttention(num_heads=num_heads, bias="all"), tied=True, **sides),
        start=1,
    )


def _thor() -> TrainRun:
    """THOR: translation by experts drawn at random, kept alike by two passes over every batch; default: Multi30k."""
    return TrainRun(
        model=thor_model(2),
        data=Translations(vocabulary=BpeVocabulary(), pool=16),
        objective=TwoPass(inner=Translate(), alpha=5.0),
        optimizer=AdamW(lr=2e-3, beta2=0.98, weight_decay=1e-4, schedule=Cosine(warmup=0.1)),
        steps=4000,
        batch_size=64,
        seq_len=64,
    )


PRESETS: dict[str, Callable[[], TrainRun]] = {"thor": _thor}
