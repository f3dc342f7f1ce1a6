"""Routing traces: one file format, recorder, reader, metrics, replay, labels, and the watch for silent experts."""

from __future__ import annotations

from .config import Recording

__all__ = ["Recording"]
