"""Checkpoint folders to models of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.config import Config
from ..core.errors import UserError
from ..ops.pages import large_pages
from .checkpoint.apply import to_ours
from .checkpoint.boxes import View
from .checkpoint.family import Family, read_fields
from .checkpoint.folder import CONFIG, FolderTensors, pickled, read_json
from .checkpoint.problems import Problems
from .checkpoint.tensors import Entry, ModelTensors, Tensors
from .families import recognised

__all__ = ["Loaded", "Opened", "load", "meta_entries", "open_folder", "read_config"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint folder, described but not read."""

    folder: Path
    source: dict[str, Any]
    family: Family
    config: Any

    def ours(self) -> View:
        """Its tensors under our names. Raises `UserError` for tensors that do not fit the config."""
        theirs: Tensors = FolderTensors(self.folder)
        if self.family.unpack is not None:
            theirs = self.family.unpack(theirs, self.source)
        entries, _ = meta_entries(self.config)
        return to_ours(theirs, self.family.table, entries, self.folder)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with where it came from. source: the content of config.json."""

    model: Any
    config: Any
    family: Family
    source: dict[str, Any]
    folder: Path


def read_config(source: str | Path | Mapping[str, Any]) -> Any:
    """Our config of a checkpoint's folder, of a config.json, or of its content. Reads no tensors."""
    if isinstance(source, Mapping):
        return read_fields(recognised(source, "config.json"), source, "config.json")
    path = Path(source)
    return open_folder(path if path.is_dir() else path.parent, path.name if path.is_file() else CONFIG).config


def open_folder(folder: str | Path, name: str = CONFIG) -> Opened:
    """What a checkpoint folder's config.json says. Never runs code that it names (`auto_map` is not looked at)."""
    path = Path(folder) / name
    if not path.exists() and (why := pickled(Path(folder))):
        raise UserError(why)
    data = read_json(path)
    if "model_type" not in data:
        raise UserError(f"{path}: has no model_type, so it is no checkpoint that transformers would load")
    family = recognised(data, path)
    return Opened(Path(folder), data, family, read_fields(family, data, path))


def meta_entries(config: Config) -> tuple[dict[str, Entry], nn.Module]:
    """Names, shapes and dtypes of a config's tensors, and the model on the meta device.

    Raises `UserError` for a config of which no model can be built.
    """
    try:
        with torch.device("meta"):
            model = config.build()
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:  # sizes that torch cannot count
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"config: no model can be built of its sizes ({why}); check the numbers") from None
    return dict(ModelTensors(model).entries()), model


@torch.no_grad()
def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Loaded:
    """The model of a checkpoint folder, for evaluation.

    dtype: of the parameters; None = as they are stored. Every tensor of both sides is accounted for, or one `UserError`
    lists those that are missing, left over, of another shape, NaN or infinite. Code in the folder is never run.
    """
    opened = open_folder(folder)
    view = opened.ours()
    entries = view.entries()
    _, model = meta_entries(opened.config)
    _shape(model, entries, dtype)
    model.to_empty(device=device)
    problems = Problems()
    for name, tensor in ModelTensors(model).items():
        view.read_into(name, large_pages(tensor, fresh=True), problems)
    problems.raise_if_any(opened.folder, "A model with such weights computes nothing; get the checkpoint again")
    return Loaded(model.eval(), opened.config, opened.family, opened.source, opened.folder)


def _shape(model: nn.Module, entries: Mapping[str, Entry], dtype: torch.dtype | None) -> None:
    """Give every parameter of a model on the meta device the dtype that it will have."""
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            full = f"{path}.{name}" if path else name
            if parameter is None or full not in entries:
                continue
            kind = entries[full].dtype
            if dtype is not None and kind.is_floating_point:
                kind = dtype
            empty = torch.empty(parameter.shape, dtype=kind, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
