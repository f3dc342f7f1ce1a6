"""Optimisers, schedules, clipping and what happens after a step. They know parameters by their metadata only."""

from .config import WSD, AdamW, AfterStep, Cosine, ExpertAveraging, Muon, Optimizer, Schedule

__all__ = ["WSD", "AdamW", "AfterStep", "Cosine", "ExpertAveraging", "Muon", "Optimizer", "Schedule"]
