"""Families whose authors gave them the `model_type` of another one: they are told by fields that only theirs have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["BORROWED", "name_of"]

BORROWED: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {"dynamic_moe": ("top_p_threshold", "expert_frequency")},
    "modernbert": {"modernbert_moe": ("num_experts", "loss_type")},
}
"""`model_type` -> families that use it without being meant by it -> fields any of which gives them away."""


def name_of(data: Mapping[str, Any]) -> object:
    """The name of a config.json's family: its `model_type`, or that of a borrower which its fields give away."""
    name = data.get("model_type")
    others = BORROWED.get(name, {}) if isinstance(name, str) else {}
    return next((n for n, own in others.items() if any(f in data for f in own)), name)
