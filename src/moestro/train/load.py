"""Reading a run folder: its settings, tokenizer and weights, each file checked against the manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..adapt.attach import attach
from ..core.errors import UserError
from ..tasks.config import Examples
from ..tasks.tokenizer import Tokenizer
from ..tasks.tokenizer_file import read_tokenizer
from ..tasks.vocabulary_file import VocabularyTokenizer, read_vocabulary
from . import manifest as manifests
from .config import TrainRun
from .files import read_json, read_tensors
from .layout import Layout
from .save import state_of
from .weights import load_weights

__all__ = ["Loaded", "load"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A trained run. model: in evaluation mode. tokenizer: of examples, their vocabulary as one (`.vocabulary`).
    corpus: the content of `corpus.json`. step: of the last state."""

    folder: Path
    config: TrainRun
    model: nn.Module
    tokenizer: Tokenizer
    corpus: dict[str, Any]
    step: int


def load(folder: str | Path, *, state: Literal["best", "last"] = "best", device: str = "cpu") -> Loaded:
    """The model of a run folder (`RUN`, or its twin's `RUN/dense`). state: best in validation, or the last one.

    Raises `UserError` naming the file when something is missing or damaged, and for tensors that fit no parameter or
    parameters that get no tensor.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; name the folder of a run")
    manifest = manifests.read(root)
    layout = Layout(root)
    manifests.verify(root, manifest, ("config.json", "tokenizer.json", "corpus.json"))
    config = TrainRun.from_dict(read_json(layout.config), where=str(layout.config))
    last = state_of(manifest.files)
    if last is None:
        raise UserError(f"{root}: nothing was saved there yet; continue the run with resume first")
    best = state == "best" and "model.safetensors" in manifest.files
    path = manifests.resolve(root, manifest, "model.safetensors" if best else f"state/{last}/model.safetensors")
    model = config.model.build()
    if config.adapters is not None:
        attach(model, config.adapters)
    load_weights(model, read_tensors(path), path)
    try:
        model = model.to(torch.device(device)).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); use cpu") from None
    return Loaded(
        folder=root,
        config=config,
        model=model,
        tokenizer=_tokenizer(config, layout),
        corpus=read_json(layout.corpus),
        step=manifest.step,
    )


def _tokenizer(config: TrainRun, layout: Layout) -> Tokenizer:
    if isinstance(config.data, Examples):
        return VocabularyTokenizer(read_vocabulary(layout.tokenizer))
    return read_tokenizer(layout.tokenizer)
