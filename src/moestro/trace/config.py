"""Config of the recorder: how much of a run's routing is kept."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import Config, config
from ..core.errors import UserError


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
        for name, least in (("every", 1), ("max_rows", 2), ("max_samples", 2), ("max_units", 1)):
            if getattr(self, name) < least:
                raise UserError(f"Recording.{name} must be at least {least}, not {getattr(self, name)}")
