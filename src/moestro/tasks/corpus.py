"""A corpus ready for training: tokenised once, streaming, into memory-mapped files that many runs share.

The folder `<cache>/corpora/<key>/` holds `train.bin` and `valid.bin` (little-endian ids), `valid.len` (bytes of text
per held-out token; absent for bytes) and `corpus.json` (how it was made: files, SHA-256s, split, sizes). The key is a
hash of the pieces of text and the tokenizer: the same text is never tokenised twice, and a changed one never mistaken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..core.errors import UserError
from ..core.folders import data_root
from .source import Source, chunks, examine, identity
from .tokenizer import Bytes, Tokenizer

__all__ = ["Corpus", "cache_folder", "open_corpus", "prepare", "skipped_line", "writable"]

SCHEMA = 1
_KINDS = {"uint8": np.dtype("<u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of both splits as read-only memory maps.

    train: [n], valid: [m] unsigned ids. valid_lengths: [m] uint32 bytes per held-out token, None = one each.
    bytes_per_token: of the training text. record: the content of `corpus.json`. key: its identity.
    """

    train: np.ndarray
    valid: np.ndarray
    valid_lengths: np.ndarray | None
    bytes_per_token: float
    key: str
    record: dict[str, Any]


def cache_folder(chosen: str = "") -> Path:
    """Where tokenised corpora are kept: as chosen, else $MOESTRO_DATA, else the user's cache folder."""
    return data_root(chosen) / "corpora"


def writable(folder: Path) -> bool:
    """Whether files can be written to a folder, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def prepare(
    source: Source, tokenizer: Tokenizer, folder: Path, say: Callable[[str], None] = lambda line: None
) -> Corpus:
    """The corpus of `source`, from `folder` where it is there already, else tokenised into it."""
    key = _key(source, tokenizer)
    place = folder / key
    if (place / "corpus.json").is_file():
        try:
            return open_corpus(folder, key)
        except UserError as damaged:
            say(f"{damaged}; tokenising again")
            shutil.rmtree(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    except OSError as error:
        raise UserError(
            f"{folder}: tokenised text cannot be kept there ({error.strerror}); choose another cache folder"
        ) from error
    try:
        _write(source, tokenizer, key, fresh)
        try:
            fresh.rename(place)
        except OSError:
            if not (place / "corpus.json").is_file():  # else somebody made the same corpus meanwhile: theirs is as good
                raise
    except OSError as error:
        raise UserError(
            f"{folder}: tokenised text cannot be written ({error.strerror}); free some space or choose another cache"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return open_corpus(folder, key)


def open_corpus(folder: Path, key: str) -> Corpus:
    """A corpus made before. Raises `UserError` when it is missing or its files are not as they were written."""
    place = folder / key
    try:
        record = json.loads((place / "corpus.json").read_text(encoding="utf-8"))
        for name, wanted in record["stored"].items():
            seen = examine(place / name)
            if (seen.size, seen.sha256) != (wanted["bytes"], wanted["sha256"]):
                raise UserError(f"{place / name}: the tokenised text is damaged")
        kind = _KINDS[record["dtype"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place}: no usable tokenised text there") from None
    lengths = _map(place / "valid.len", np.dtype("<u4")) if "valid.len" in record["stored"] else None
    train, valid = (_map(place / f"{split}.bin", kind) for split in ("train", "valid"))
    ratio = record["splits"]["train"]["bytes"] / max(1, len(train))
    return Corpus(train, valid, lengths, ratio, key, record)


def _map(path: Path, kind: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.empty(0, kind)


def _key(source: Source, tokenizer: Tokenizer) -> str:
    said = json.dumps([SCHEMA, tokenizer.key, identity(source.pieces)], sort_keys=True)
    return hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()[:32]


def _write(source: Source, tokenizer: Tokenizer, key: str, place: Path) -> None:
    size = tokenizer.vocab_size
    dtype = "uint8" if size <= 1 << 8 else "uint16" if size <= 1 << 16 else "uint32"
    plain = isinstance(tokenizer, Bytes)
    names = ["train.bin", "valid.bin"] + ([] if plain else ["valid.len"])
    files = {name: _Hashed(place / name) for name in names}
    tokens, bytes_ = {"train": 0, "valid": 0}, {"train": 0, "valid": 0}
    end = np.asarray([tokenizer.separator], dtype=np.int64)
    for piece in source.pieces:
        split = piece.split
        for text in chunks(piece):
            made = tokenizer.encode(text)
            files[f"{split}.bin"].write(made.ids.astype(_KINDS[dtype]))
            if split == "valid" and not plain:
                files["valid.len"].write(made.lengths.astype("<u4"))
            tokens[split] += len(made.ids)
            bytes_[split] += int(made.lengths.sum())
        files[f"{split}.bin"].write(end.astype(_KINDS[dtype]))
        if split == "valid" and not plain:
            files["valid.len"].write(np.zeros(1, dtype="<u4"))
        tokens[split] += 1
        bytes_[split] += int(plain)
    record = {
        "schema": SCHEMA,
        "title": source.title,
        "key": key,
        "tokenizer": tokenizer.key,
        "vocab_size": size,
        "dtype": dtype,
        "splits": {s: {"tokens": tokens[s], "bytes": bytes_[s]} for s in ("train", "valid")},
        "skipped": dict(source.skipped),
        "stored": {name: file.close() for name, file in files.items()},
        "files": _listed(source),
    }
    (place / "corpus.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _listed(source: Source) -> list[dict[str, Any]]:
    return [
        {"name": p.name, "sha256": p.sha256, "start": p.start, "stop": p.stop, "split": p.split} for p in source.pieces
    ]


class _Hashed:
    """A file being written, with its size and SHA-256."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, values: np.ndarray) -> None:
        data: bytes = values.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def skipped_line(skipped: Mapping[str, int]) -> str:
    """What was left out, for people: "3 binary, 1 empty"."""
    return ", ".join(f"{n} {reason}" for reason, n in skipped.items() if n)
