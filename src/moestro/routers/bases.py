"""Base configs of a router's steps. No torch."""

from __future__ import annotations

from ..core.config import Config, config

__all__ = ["Limit", "Mix", "Priority", "Score", "Select", "Weigh"]


@config
class Score(Config):
    """Base of score steps: x [T, D] -> clean logits [T, E'] fp32. Built with (dim, num_ids)."""


@config
class Mix(Config):
    """Base of mix steps: (Scores, x, signals, carry) -> (Scores, carry). Built with (dim, num_ids)."""


@config
class Select(Config):
    """Base of select steps: (Scores, x, signals) -> choices. Built with (num_experts, num_ids)."""


@config
class Weigh(Config):
    """Base of weigh steps: (Scores, expert [T, K]) -> weight [T, K] fp32. Built without sizes."""


@config
class Limit(Config):
    """Base of limit steps: (expert [T, K], Scores, signals) -> (expert, kept [T, K], capacity).

    Built with (num_experts, num_ids).
    """


@config
class Priority(Config):
    """Base of drop policies: who is served first where an expert has too little room. Built without sizes."""
