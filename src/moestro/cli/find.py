"""From a name on the command line to a config. Loads no torch."""

from __future__ import annotations

import json
from pathlib import Path

from ..core.errors import UserError, did_you_mean
from ..models.published import PUBLISHED
from ..train.config import TrainRun
from ..train.presets import PRESETS

__all__ = ["find"]


def find(name: str) -> TrainRun:
    """The run that a name means: a preset, a published model, a run folder or its config.json."""
    if name in PRESETS:
        return PRESETS[name]()
    if name in PUBLISHED:
        model = PUBLISHED[name]()
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
