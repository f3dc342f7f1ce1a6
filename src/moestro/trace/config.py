"""Config of the recorder: how much of a run's routing is kept."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import Config, config


@config
class Recording(Config):
    """What a routing trace keeps: counts of every step, and full tables of a few sampled batches. Memory is bounded."""

    builds: ClassVar[str] = "moestro.trace.record:Recorder"
    every: int = 100
    """Sample a batch every so many steps (the trainer reads this)."""
    max_rows: int = 1024
    """Most rows of counts; beyond it, neighbouring steps are summed and the resolution halves."""
    max_samples: int = 8
    """Most sampled batches per name; beyond it, every second one is let go (the first and the last stay)."""
    max_units: int = 16384
    """Most units of one sampled batch; the rest of the batch is left out."""
    weights: Literal["float16", "float32"] = "float16"
    """Dtype of combine weights and entropies in the tables."""

    def __post_init__(self) -> None:
        self.at_least(1, "every", "max_units")
        self.at_least(2, "max_rows", "max_samples")
