"""Moestro: mixture-of-experts transformers in PyTorch. Names load on first use, so importing the package is cheap."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .core.version import __version__

_NAMES = {
    "MoE": "moestro.moe.dropin",
    "collect": "moestro.moe.dropin",
    "checkpoint": "moestro.ops.choice",
    "checkpoint_context": "moestro.ops.choice",
    "Plan": "moestro.core.plan",
    "ExpertChoice": "moestro.core.plan",
    "Dense": "moestro.core.plan",
    "Trail": "moestro.core.trail",
    "Carry": "moestro.core.carry",
    "Replay": "moestro.core.carry",
    "Live": "moestro.core.carry",
    "Signals": "moestro.core.signals",
}

__all__ = [
    "Carry",
    "Dense",
    "ExpertChoice",
    "Live",
    "MoE",
    "Plan",
    "Replay",
    "Signals",
    "Trail",
    "__version__",
    "checkpoint",
    "checkpoint_context",
    "collect",
]

if TYPE_CHECKING:
    from .core.carry import Carry, Live, Replay
    from .core.plan import Dense, ExpertChoice, Plan
    from .core.signals import Signals
    from .core.trail import Trail
    from .moe.dropin import MoE, collect
    from .ops.choice import checkpoint, checkpoint_context


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'moestro' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
