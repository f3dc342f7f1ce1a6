"""The tensors of a checkpoint folder: one safetensors file or several with an index, nothing else, nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.errors import UserError
from .header import SafeFile
from .tensors import Entry

__all__ = ["CONFIG", "INDEX", "SINGLE", "FolderTensors", "check_inside", "pickled", "read_json"]

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.bin.index.json")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `UserError` naming the file where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a checkpoint's folder") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: damaged, it holds no JSON; get the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object; get the file again")
    return found


def pickled(folder: Path) -> str:
    """The one line about a folder that holds pickles, empty where it holds none."""
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if not pickles:
        return ""
    return (
        f"{folder}: {pickles[0]} is a pickle, which can run code when it is opened and is never read; where you trust "
        "it, write its tensors as model.safetensors (torch.load, then safetensors.torch.save_file) beside config.json"
    )


class FolderTensors:
    """Tensors of a folder, memory-mapped. Every file is opened and checked at once; data are read when asked for.

    Raises `UserError` where there are pickles only (they can run code), where the index is no index, names a file
    outside the folder, or contradicts what the files hold.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a checkpoint's folder")
        index, single = self.folder / INDEX, self.folder / SINGLE
        self._files: dict[str, SafeFile] = {}
        if index.is_file() and not single.is_file():
            self._by_index(index)
        elif single.is_file():
            self._add(single)
        else:
            raise UserError(self._nothing())
        own = {id(file): file.entries() for file in self._files.values()}
        self._entries = {name: own[id(file)][name] for name, file in self._files.items()}

    def _nothing(self) -> str:
        found = pickled(self.folder)
        return found or f"{self.folder}: holds neither {SINGLE} nor {INDEX}; name a checkpoint's folder"

    def _add(self, path: Path) -> None:
        check_inside(path, self.folder)
        file = SafeFile(path)
        for name in file.entries():
            if name in self._files:
                raise UserError(f"{self.folder}: {name} is in {self._files[name].path.name} and in {path.name}")
            self._files[name] = file

    def _by_index(self, index: Path) -> None:
        said = read_json(index).get("weight_map")
        if not isinstance(said, dict) or not all(isinstance(v, str) for v in said.values()) or not said:
            raise UserError(f"{index}: has no weight_map from tensors to files; get the file again")
        for shard in sorted(set(said.values())):
            if Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard or "\0" in shard:
                raise UserError(f"{index}: names {shard!r}, which is outside its folder; do not trust this checkpoint")
            if not shard.endswith(".safetensors"):
                raise UserError(f"{index}: names {shard!r}, which is no safetensors file; pickles are never read")
            if not (self.folder / shard).is_file():
                raise UserError(f"{index}: names {shard}, which is not in the folder; get the file")
            self._add(self.folder / shard)
        for name, shard in said.items():
            if name not in self._files or self._files[name].path.name != shard:
                raise UserError(f"{index}: says that {shard} holds {name}, which it does not; get both files again")
        extra = sorted(self._files.keys() - said.keys())
        if extra:
            path = self._files[extra[0]].path
            raise UserError(f"{path}: holds {extra[0]}, of which {INDEX} knows nothing; get both files again")

    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def read(self, name: str) -> Tensor:
        return self._files[name].read(name)


def check_inside(path: Path, folder: Path) -> None:
    """Raise `UserError` for a link that leads out of a checkpoint's folder."""
    if path.resolve().parent != folder.resolve() and not _in_cache(path, folder):
        raise UserError(f"{path}: leads to {path.resolve()}, outside the checkpoint's folder; copy the file there")


def _in_cache(path: Path, folder: Path) -> bool:
    """Whether a link follows the layout of the Hub's cache: snapshots/<commit>/file -> blobs/<hash>."""
    home = folder.resolve()
    return home.parent.name == "snapshots" and path.resolve().parent == home.parent.parent / "blobs"
