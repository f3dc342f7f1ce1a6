"""Losses on plans: one published equation per class, from sums that add over micro-batches, ranks and passes."""

from __future__ import annotations

from .config import (
    GShardBalance,
    ImportanceCV2,
    LoadCV2,
    Loss,
    MutualInformation,
    PerUnitBalance,
    RoutingEntropy,
    SequenceBalance,
    SwitchBalance,
    TokenInformation,
    ZLoss,
    examples,
)

__all__ = [
    "GShardBalance",
    "ImportanceCV2",
    "LoadCV2",
    "Loss",
    "MutualInformation",
    "PerUnitBalance",
    "RoutingEntropy",
    "SequenceBalance",
    "SwitchBalance",
    "TokenInformation",
    "ZLoss",
    "examples",
]
