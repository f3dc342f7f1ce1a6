"""Preset of one member of a sweep over sparsity (39)."""

from __future__ import annotations

from collections.abc import Callable

from ...experts.config import Gated
from ...losses.config import SwitchBalance, ZLoss
from ...models.config import Decoder
from ...moe.config import MoELayer
from ...nn.config import Attention, RMSNorm
from ...optim.config import AdamW
from ...routers.config import Router, TopK
from ..config import TrainRun

__all__ = ["PRESETS"]


def _optimal_sparsity() -> TrainRun:
    """Mixtral's architecture with experts twice as wide as the model, 16 of them, top-2 (39); sweep model.moe.*."""
    return TrainRun(
        model=Decoder(
            dim=96,
            num_layers=3,
            attention=Attention(num_heads=4),
            moe=MoELayer(
                num_experts=16,
                router=Router(select=TopK(k=2)),
                experts=Gated(width=192),
                losses=(SwitchBalance(coefficient=0.01), ZLoss(coefficient=0.001)),
            ),
            norm=RMSNorm(eps=1e-5),
            context=256,
            init_std=None,
        ),
        optimizer=AdamW(lr=4e-3),
        steps=2000,
        batch_size=8,
        seq_len=256,
    )


PRESETS: dict[str, Callable[[], TrainRun]] = {"optimal-sparsity": _optimal_sparsity}
