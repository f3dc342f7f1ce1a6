"""Starting a run from weights that are there: those of another run, or of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..convert.checkpoint.family import canonical, difference
from ..convert.loading import load as load_checkpoint
from ..core.errors import UserError
from .adapters import added
from .layout import is_run
from .load import load as load_run
from .weights import load_weights, tensors_of

__all__ = ["start"]


def start(model: nn.Module, folder: str) -> None:
    """Put the weights of `folder` (a run's best, or those of a transformers or Moestro checkpoint) into the model.

    Stored in fewer bits, they become the model's dtype. Adapters of the model begin as they are or, where the folder is
    of a run with the same ones, as they are there. Raises `UserError` where the folder cannot be read or holds a
    model that computes something else: its config must be that of the model, but for what concerns training only.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"start: {folder} is no folder; name a run or a checkpoint folder")
    found = load_run(root).model if is_run(root) else load_checkpoint(root, dtype=torch.float32).model
    theirs, ours = canonical(found.config), canonical(model.config)  # type: ignore[arg-type]
    other = difference({**theirs, "context": 0}, {**ours, "context": 0})
    if other:
        raise UserError(
            f"start: the model of {folder} is another one than that of this run: {other}; leave the model's options out"
        )
    load_weights(model, {**added(model), **tensors_of(found)}, root)
