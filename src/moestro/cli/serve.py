"""`moestro serve`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..core.errors import UserError
from .parse import parse

__all__ = ["main", "prepared"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Serve a model with transformers' own server, which speaks the OpenAI protocol: POST /v1/completions (and
    /v1/chat/completions where the tokenizer has a chat template), GET /v1/models, GET /health."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN|FOLDER")]]
    """A run folder, or a model folder that transformers loads (one written by `moestro convert`, for instance)."""
    host: str = "localhost"
    """Address to listen at."""
    port: int = 8000
    """Port to listen at."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    dtype: str = "auto"
    """Of the weights: auto = as they are stored, bfloat16, float16, float32."""
    log_level: str = "warning"
    """debug, info, warning, error."""
    out: str | None = None
    """Keep the model folder that is written for a run here; None = a temporary one."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="serve")
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise UserError("transformers' server needs further packages; pip install 'transformers[serving]'")
    import moestro.convert.hf  # noqa: F401 - makes transformers know our models

    with tempfile.TemporaryDirectory(prefix="moestro-serve-") as place:
        folder = prepared(options.model, Path(options.out or place))
        start(folder, options)
    return 0


def prepared(model: str, place: Path) -> Path:
    """The model folder to serve: the given one, or what `place` holds after the run was written there."""
    from ..train.layout import is_run

    path = Path(model)
    if is_run(path):
        from ..train.hf import write_run

        if place.is_dir() and any(place.iterdir()):
            raise UserError(f"{place}: holds files already; choose another folder for --out")
        return write_run(path, place)
    try:
        data = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{path}: no run and no model folder (no config.json that can be read); name a folder written by "
            "moestro train or moestro convert"
        ) from None
    if not isinstance(data, dict) or "model_type" not in data:
        raise UserError(f"{path / 'config.json'}: names no model_type, so it is no model that transformers loads")
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(f"{path}: has no tokenizer beside the model; put its files there, tokenizer.json first of all")
    return path


def start(folder: Path, options: Options, **more: Any) -> Any:
    """Transformers' server, with this model loaded; returns when it is stopped."""
    from transformers.cli.serve import Serve

    if "@" in str(folder.resolve()):
        raise UserError(f"{folder}: the server takes what follows @ in a path for a revision; move the folder")
    print(f"serving {folder} at http://{options.host}:{options.port}/v1", flush=True)
    return Serve(
        force_model=str(folder.resolve()),
        host=options.host,
        port=options.port,
        device=options.device,
        dtype=options.dtype,
        log_level=options.log_level,
        **more,
    )
