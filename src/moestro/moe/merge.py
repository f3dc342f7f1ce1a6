"""How the routed output and that of the shared expert become one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ConcatMerge", "GateMerge", "MeanMerge", "SumMerge"]


class SumMerge:
    """routed + shared. Shapes: [T, *u] twice -> [T, *u]. gated: whether a learned gate [D -> 1] is wanted."""

    gated: bool = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, routed: Tensor, shared: Tensor, x: Tensor, gate: nn.Module | None) -> Tensor:
        return routed + shared


class MeanMerge(SumMerge):
    """(routed + shared) / 2."""

    def __call__(self, routed: Tensor, shared: Tensor, x: Tensor, gate: nn.Module | None) -> Tensor:
        return (routed + shared) / 2


class GateMerge(SumMerge):
    """routed + sigmoid(gate(x)) * shared (Qwen2-MoE)."""

    gated = True

    def __call__(self, routed: Tensor, shared: Tensor, x: Tensor, gate: nn.Module | None) -> Tensor:
        assert gate is not None
        return routed + torch.sigmoid(gate(x)) * shared


class ConcatMerge(SumMerge):
    """routed and shared side by side. Shapes: [T, *u, D] and [T, *u, D'] -> [T, *u, D + D']."""

    def __call__(self, routed: Tensor, shared: Tensor, x: Tensor, gate: nn.Module | None) -> Tensor:
        return torch.cat([routed, shared.to(routed.dtype)], dim=-1)
