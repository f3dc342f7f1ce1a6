"""Functions that are loaded when they are called, so that what systems are and claim can be read without torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["later"]


def later(system: str, name: str) -> Callable[..., Any]:
    """The function `name` of `papers/training/<system>.py`, whose module is loaded at the first call."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{__package__}.training.{system}"), name)(*args)

    return call
