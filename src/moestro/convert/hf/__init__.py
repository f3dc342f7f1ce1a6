"""Moestro inside transformers: importing this registers our experts as `experts_implementation="moestro"`."""

from __future__ import annotations

from .experts import Explanation, explain, register
from .use import use

__all__ = ["Explanation", "explain", "register", "use"]

register()
