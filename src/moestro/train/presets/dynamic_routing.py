"""Preset of dynamic routing by top-p (21)."""

from __future__ import annotations

from collections.abc import Callable

from ...experts.config import Gated
from ...losses.config import PerUnitBalance, RoutingEntropy
from ...models.config import Decoder
from ...moe.config import MoELayer
from ...nn.config import Attention
from ...optim.config import AdamW
from ...routers.config import Raw, Router, TopP
from ..config import TrainRun

__all__ = ["PRESETS"]


def _dynamic_routing() -> TrainRun:
    """Top-p 0.4 among 16 experts with an entropy loss (21), and a dense twin of two experts' FLOPs per token."""
    return TrainRun(
        model=Decoder(
            dim=64,
            num_layers=4,
            attention=Attention(num_heads=4),
            moe=MoELayer(
                num_experts=16,
                router=Router(select=TopP(p=0.4, expected=2.0), weigh=Raw()),
                experts=Gated(width=96),
                losses=(PerUnitBalance(coefficient=1e-2), RoutingEntropy(coefficient=1e-4)),
            ),
            context=256,
        ),
        optimizer=AdamW(lr=4e-3),
        steps=2000,
        batch_size=16,
        seq_len=128,
    )


PRESETS: dict[str, Callable[[], TrainRun]] = {"dynamic-routing": _dynamic_routing}
