"""Presets of language models."""

from __future__ import annotations

from collections.abc import Callable

from ...experts.config import Gated
from ...losses.config import RoutingEntropy, SwitchBalance, ZLoss
from ...models.config import Decoder
from ...moe.config import MoELayer
from ...nn.config import Attention, FeedForward
from ...optim.config import AdamW
from ...routers.config import Router, TopK
from ..config import TrainRun

__all__ = ["PRESETS"]


def _stdlib() -> TrainRun:
    """Sparse decoder (16 experts, top-2) and its dense twin on Python's standard library, as bytes; two CPU cores."""
    return TrainRun(
        model=Decoder(
            dim=64,
            num_layers=3,
            attention=Attention(num_heads=2, num_kv_heads=1, head_dim=32, qk_norm="head"),
            ffn=FeedForward(width=392),
            layout=("dense", "moe", "moe"),
            moe=MoELayer(
                num_experts=16,
                router=Router(select=TopK(k=2)),
                experts=Gated(width=192),
                losses=(SwitchBalance(coefficient=0.01), ZLoss(coefficient=1e-4)),
            ),
            context=256,
            init_std=None,
        ),
        optimizer=AdamW(lr=8e-3),
        steps=2000,
        batch_size=16,
        seq_len=128,
    )


def _stdlib_dense() -> TrainRun:
    """The dense twin of stdlib, alone."""
    sparse = _stdlib()
    return sparse.replace(model=sparse.model.replace(moe=None, layout=None), twin=False)


def _tiny() -> TrainRun:
    """A model of a few thousand parameters, for trying things out in seconds."""
    return TrainRun(
        model=Decoder(
            dim=16,
            num_layers=2,
            attention=Attention(num_heads=2, num_kv_heads=1, head_dim=8, qk_norm="head"),
            ffn=FeedForward(width=32),
            moe=MoELayer(
                num_experts=4,
                router=Router(select=TopK(k=2)),
                experts=Gated(width=16),
                losses=(SwitchBalance(coefficient=0.01), RoutingEntropy(coefficient=0.0)),
            ),
            context=64,
        ),
        optimizer=AdamW(lr=1e-2),
        steps=60,
        batch_size=8,
        seq_len=32,
        eval_every=20,
        eval_windows=32,
    )


def _bench() -> TrainRun:
    """Four routed layers of 64 experts, top-8, width 512: the larger of the shapes whose training speed is measured."""
    return TrainRun(
        model=Decoder(
            dim=512,
            num_layers=4,
            attention=Attention(num_heads=8, num_kv_heads=8, head_dim=64, qk_norm="head"),
            moe=MoELayer(
                num_experts=64,
                router=Router(select=TopK(k=8)),
                experts=Gated(width=256),
                losses=(SwitchBalance(coefficient=0.01), ZLoss(coefficient=1e-4)),
            ),
            context=256,
            init_std=None,
        ),
        optimizer=AdamW(lr=1e-3),
        steps=2000,
        batch_size=16,
        seq_len=256,
    )


PRESETS: dict[str, Callable[[], TrainRun]] = {
    "stdlib": _stdlib,
    "stdlib-dense": _stdlib_dense,
    "tiny": _tiny,
    "bench": _bench,
}
