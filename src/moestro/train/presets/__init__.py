"""Presets: name -> function that makes a config. The first line of its docstring is what lists show. No torch here."""

from __future__ import annotations

from collections.abc import Callable

from ...core.errors import UserError, did_you_mean
from ..config import TrainRun
from . import adapters, dynamic_routing, growing, language, optimal_sparsity, pairs, reading, routing, translation

__all__ = ["DEFAULT", "PRESETS", "preset"]

DEFAULT = "stdlib"

PRESETS: dict[str, Callable[[], TrainRun]] = {
    **language.PRESETS,
    **adapters.PRESETS,
    **routing.PRESETS,
    **reading.PRESETS,
    **pairs.PRESETS,
    **optimal_sparsity.PRESETS,
    **dynamic_routing.PRESETS,
    **growing.PRESETS,
    **translation.PRESETS,
}


def preset(name: str) -> TrainRun:
    """The config of a preset. Raises `UserError` for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return PRESETS[name]()
