"""Optimisers, schedules, clipping and what happens after a step. They know parameters by their metadata only."""

from .config import WSD, AdamW, Cosine, Optimizer, Schedule

__all__ = ["WSD", "AdamW", "Cosine", "Optimizer", "Schedule"]
