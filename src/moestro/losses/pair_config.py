"""Configs of losses on pairs of embeddings, with the other pairs of a group as negatives. Built without sizes."""

from __future__ import annotations

from typing import ClassVar

from ..core.config import Config, config

__all__ = ["MNR", "MNRPlus", "PairLoss", "pair_examples"]


@config
class PairLoss(Config):
    """Base of losses on pairs: what is built is `(a [..., n, D], b [..., n, D]) -> nats of each pair [..., n]`."""

    temperature: float = 1.0
    """Similarities are divided by this."""
    normalised: bool = False
    """Whether similarities are cosines instead of inner products."""

    def __post_init__(self) -> None:
        self.positive("temperature")


@config
class MNR(PairLoss):
    """Multiple negatives ranking: cross-entropy of each a's own b among all b (Henderson et al. 2017)."""

    builds: ClassVar[str] = "moestro.losses.pairs:MNRLoss"
    symmetric: bool = False
    """Mean with the cross-entropy of each b's own a among all a (CLIP)."""


@config
class MNRPlus(PairLoss):
    """Both directions, with the nearest pair by the texts' own similarities as target (clip, mnr_plus of brief 34)."""

    builds: ClassVar[str] = "moestro.losses.pairs:MNRPlusLoss"


def pair_examples() -> dict[str, PairLoss]:
    """One config of every kind, by name."""
    return {
        "mnr": MNR(),
        "mnr_symmetric": MNR(symmetric=True, temperature=0.1, normalised=True),
        "mnr_plus": MNRPlus(),
        "mnr_plus_cosine": MNRPlus(temperature=0.5, normalised=True),
    }
