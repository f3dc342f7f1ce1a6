"""From a name on the command line to a config. Loads torch for the folders of checkpoints only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.errors import UserError, did_you_mean
from ..models.config import Decoder
from ..models.published import PUBLISHED
from ..train.config import TrainRun
from ..train.presets import PRESETS

__all__ = ["checkpoint", "find"]


def checkpoint(name: str) -> Any:
    """The config of the model in a checkpoint folder (or its config.json), whose tensors are not read; None where the
    name is something else. Raises `UserError` for a checkpoint of an unknown family."""
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if name in PRESETS or name in PUBLISHED or not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(data, dict) or "model_type" not in data:
        return None
    from ..convert import read_config

    return read_config(path)


def find(name: str) -> TrainRun:
    """The run that a name means: a preset, a published model, the folder of a run or of a checkpoint, a config.json."""
    if name in PRESETS:
        return PRESETS[name]()
    if name in PUBLISHED:
        model = PUBLISHED[name]()
        return TrainRun(model=model, seq_len=model.context)
    model = checkpoint(name)
    if model is not None:
        if not isinstance(model, Decoder):
            raise UserError(f"{name}: a {type(model).__name__}; runs train a Decoder (moestro info shows its size)")
        return TrainRun(model=model, seq_len=model.context)
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        known = [*PRESETS, *PUBLISHED]
        raise UserError(
            f"{name!r} is no preset, published model or run folder{did_you_mean(name, known)}; "
            f"known: {', '.join(known)}"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: this is no JSON; name a run folder or its config.json") from None
    return TrainRun.from_dict(data, where=str(path))
