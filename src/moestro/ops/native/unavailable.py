"""Why there are no compiled kernels."""

from __future__ import annotations

__all__ = ["Unavailable"]


class Unavailable(Exception):
    """The kernels cannot be had, or not from there; the message is the reason, in one line. Never leaves the folder."""
