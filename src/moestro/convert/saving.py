"""Models of ours, and folders, to checkpoint folders that other tools load."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import Config
from ..core.errors import UserError
from .checkpoint.apply import to_theirs
from .checkpoint.boxes import Box, View, read_box
from .checkpoint.family import config_fields
from .checkpoint.folder import CONFIG, check_inside
from .checkpoint.shards import SHARD_BYTES, new_folder, write_json, write_tensors
from .checkpoint.tensors import Entry, ModelTensors, Tensors
from .checkpoint.tokenizer import write_tokenizer
from .families import find
from .loading import Loaded, meta_entries, open_folder

__all__ = ["Cast", "save", "stream"]

_GENERATION = "generation_config.json"


class Cast:
    """Tensors in another floating dtype, but for those named in `keep`."""

    def __init__(self, source: Tensors, dtype: torch.dtype, keep: frozenset[str] = frozenset()) -> None:
        self._source, self._dtype, self._keep = source, dtype, keep
        self._entries = {name: Entry(e.shape, self._kind(name, e.dtype)) for name, e in source.entries().items()}

    def _kind(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if dtype.is_floating_point and name not in self._keep else dtype

    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, name: str) -> Tensor:
        return self._source.read(name).to(self._entries[name].dtype)

    def read_box(self, name: str, box: Box) -> Tensor:
        return read_box(self._source, name, box).to(self._entries[name].dtype)


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    to: str = "moestro",
    source: Mapping[str, Any] | Loaded | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | Path | None = None,
) -> Path:
    """Write a model as a checkpoint folder of the family `to`. The folder appears whole, or not at all.

    source: the config.json that the model came from, whose other fields are kept; a `Loaded` also gives its generation
    config and tokenizer. dtype: of floating parameters; None = as they are. tokenizer: a folder to copy tokenizer files
    from, or "bytes" for the library's own. Raises `UserError` that names what the family cannot express.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise UserError(f"{type(model).__name__} has no config, so its config.json cannot be written")
    if not isinstance(config, Config):
        raise UserError(
            f"{type(model).__name__} is no model of this library; write it with its own save_pretrained, and load that "
            "folder with convert.load"
        )
    entries, meta = meta_entries(config)
    tensors: Tensors = ModelTensors(model)
    _same_names(tensors.entries(), entries, type(model).__name__)
    if dtype is not None:
        tensors = Cast(tensors, dtype, frozenset(name for name, _ in meta.named_buffers()))
    data = source.source if isinstance(source, Loaded) else source
    beside = source.folder if isinstance(source, Loaded) else None
    return _write(tensors, config, Path(folder), to, data, beside, shard_bytes, tokenizer)


def stream(
    source_folder: str | Path,
    out_folder: str | Path,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | Path | None = None,
) -> Path:
    """Rewrite a checkpoint folder in another family's layout (or its own), without a model in memory.

    At no time are more than a few of its tensors held. Otherwise as `load` and `save`.
    """
    opened = open_folder(source_folder)
    tensors: Tensors = opened.ours()
    if dtype is not None:
        _, meta = meta_entries(opened.config)
        tensors = Cast(tensors, dtype, frozenset(name for name, _ in meta.named_buffers()))
    out = Path(out_folder)
    return _write(tensors, opened.config, out, to, opened.source, opened.folder, shard_bytes, tokenizer)


def _same_names(own: Mapping[str, Entry], expected: Mapping[str, Entry], kind: str) -> None:
    for name in sorted(own.keys() ^ expected.keys()):
        raise UserError(
            f"{kind}: {name} is {'not ' if name in expected else ''}in the model, which its config does not say; save "
            "models as they were built (packed weights and adapters have formats of their own)"
        )
    for name, entry in own.items():
        if entry.shape != expected[name].shape:
            raise UserError(f"{kind}: {name} is {list(entry.shape)}, its config says {list(expected[name].shape)}")


def _write(
    tensors: Tensors,
    config: Any,
    folder: Path,
    to: str,
    source: Mapping[str, Any] | None,
    beside: Path | None,
    shard_bytes: int,
    tokenizer: str | Path | None,
) -> Path:
    family = find(to)
    fields = config_fields(family, config, source)
    theirs: View = to_theirs(tensors, family.table, to)
    fields["dtype"] = _main_dtype(theirs)
    with new_folder(folder) as new:
        write_tensors(theirs, new, shard_bytes, folder)
        write_json(new / CONFIG, fields)
        if beside is not None and (beside / _GENERATION).is_file():
            check_inside(beside / _GENERATION, beside)
            shutil.copyfile(beside / _GENERATION, new / _GENERATION)
        write_tokenizer(new, beside if tokenizer is None else tokenizer, needed=tokenizer is not None)
    return folder


def _main_dtype(tensors: Tensors) -> str:
    """The dtype of most entries, as config.json names it."""
    counts: dict[str, int] = {}
    for entry in tensors.entries().values():
        if entry.dtype.is_floating_point:
            name = str(entry.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + entry.numel
    return max(counts, key=lambda name: counts[name], default="float32")
