"""Layouts of checkpoints that authors' own code writes and transformers does not know, each in a file of its own.

A folder in such a layout holds model.safetensors, and a config.json with `model_type` and the settings of that code.
"""

from __future__ import annotations

import pkgutil

__all__ = ["AUTHORS"]

AUTHORS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""The model types that are known: one for every file of this folder."""
