"""Models in, out and into each other. Names load on first use, so that importing the package loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "Loaded": "loading",
    "load": "loading",
    "read_config": "loading",
    "save": "saving",
    "stream": "saving",
}

__all__ = ["Loaded", "load", "read_config", "save", "stream"]

if TYPE_CHECKING:
    from .loading import Loaded, load, read_config
    from .saving import save, stream


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
