"""Losses on plans: one published equation per class, from sums that add over micro-batches, ranks and passes.

Beside them losses on pairs of embeddings, and on two predictions for the same units (`consistency`)."""

from __future__ import annotations

from .config import (
    MNR,
    GShardBalance,
    ImportanceCV2,
    LoadCV2,
    Loss,
    MNRPlus,
    MutualInformation,
    PairLoss,
    PerUnitBalance,
    RoutingEntropy,
    SequenceBalance,
    SpecifiedExpert,
    SwitchBalance,
    TokenInformation,
    ZLoss,
    examples,
    pair_examples,
)

__all__ = [
    "MNR",
    "GShardBalance",
    "ImportanceCV2",
    "LoadCV2",
    "Loss",
    "MNRPlus",
    "MutualInformation",
    "PairLoss",
    "PerUnitBalance",
    "RoutingEntropy",
    "SequenceBalance",
    "SpecifiedExpert",
    "SwitchBalance",
    "TokenInformation",
    "ZLoss",
    "examples",
    "pair_examples",
]
