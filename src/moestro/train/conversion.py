"""What lies in folders, converted into a new folder: the function behind `moestro convert`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..convert import load, save, stream
from ..convert.checkpoint.shards import new_folder
from ..convert.checkpoint.tokenizer import BYTES
from ..convert.config import Conversion, Resize
from ..convert.loading import open_folder
from ..convert.receipt import Receipt
from ..core.errors import UserError
from ..tasks.tokenizer import Bytes, Tokenizer
from ..tasks.tokenizer_file import read_tokenizer
from .layout import is_run
from .load import load as load_run

__all__ = ["convert"]


def convert(
    sources: Sequence[str | Path],
    out: str | Path,
    conversion: Conversion | None = None,
    *,
    to: str | None = None,
    text: str | Path | None = None,
    tokens: int = 8192,
    seq_len: int = 256,
    dtype: torch.dtype | None = None,
) -> Receipt | None:
    """Convert what lies in `sources` and write it to the new folder `out`, with `receipt.json` in it.

    conversion None = the format only: checkpoint folders are then rewritten from disk to disk, and there is no receipt.
    Returns the receipt. Raises `UserError`; nothing is left at `out` then.
    """
    out = Path(out)
    folders = [Path(s) for s in sources]
    several = conversion is not None and conversion.several
    if len(folders) != 1 and not several:
        name = "none" if conversion is None else type(conversion).__name__
        raise UserError(f"method {name} takes one SOURCE, found {len(folders)}")
    if several and len(folders) < 2:
        raise UserError(
            f"method {type(conversion).__name__} takes several SOURCEs and OUT, found {len(folders)} SOURCE"
        )
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run or a checkpoint folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; name a new folder, or remove it first")
    if conversion is None and not is_run(folders[0]):
        stream(folders[0], out, to=_family(folders[0]) if to is None else to, dtype=dtype)
        return None
    opened = [_open(folder) for folder in folders]
    _same_words(folders)
    source, first = folders[0], opened[0]
    model, tokenizer, loaded = first.model, first.tokenizer, first.loaded
    family = to or (loaded.family.model_type if loaded and isinstance(conversion, Resize) else "moestro")
    files = _tokenizer_files(source, tokenizer)
    receipt = None
    if conversion is not None:
        given: dict[str, Any] = {}
        if text is not None:
            tokenizer = tokenizer or _tokenizer(source, model)
            given = _tokens(Path(text), tokenizer, tokens, min(seq_len, getattr(model.config, "context", seq_len)))
        models = [o.model for o in opened] if several else model
        model, receipt = conversion.build(models, sources=tuple(map(str, folders)), **given)
    with new_folder(out) as new:
        new.rmdir()
        save(model, new, to=family, source=_source(loaded, family), dtype=dtype, tokenizer=files)
        _generation(loaded, new)
        if receipt is not None:
            receipt.write(new)
    return receipt


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A source. tokenizer: of a run; loaded: of a checkpoint folder."""

    model: nn.Module
    tokenizer: Tokenizer | None = None
    loaded: Any = None


def _open(source: Path) -> _Opened:
    if is_run(source):
        found = load_run(source)
        return _Opened(found.model, tokenizer=found.tokenizer)
    loaded = load(source)
    return _Opened(loaded.model, loaded=loaded)


def _same_words(folders: Sequence[Path]) -> None:
    """Raise `UserError` where the sources' tokenizers give different ids."""
    known: dict[Path, Any] = {}
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            data = json.loads((folder / "tokenizer.json").read_bytes())
            if isinstance(data, dict) and "model" in data:
                known[folder] = [data["model"], data.get("added_tokens")]
    for folder, words in known.items():
        if words != next(iter(known.values())):
            raise UserError(f"{folder}: its tokenizer is not that of {next(iter(known))}; models need a common one")


def _source(loaded: Any, family: str) -> Any:
    """config.json of the source, where the new one is of the same family and keeps its other fields."""
    return loaded.source if loaded is not None and loaded.family.model_type == family else None


def _generation(loaded: Any, out: Path) -> None:
    name = "generation_config.json"
    if loaded is not None and (loaded.folder / name).is_file():
        (out / name).write_bytes((loaded.folder / name).read_bytes())


def _tokenizer_files(source: Path, tokenizer: Tokenizer | None) -> Path | str | None:
    """The folder whose tokenizer files belong to the new one, or the word for bytes."""
    if isinstance(tokenizer, Bytes):
        return BYTES
    return source if (source / "tokenizer.json").is_file() else None


def _family(source: Path) -> str:
    return open_folder(source).family.model_type


def _tokenizer(source: Path, model: nn.Module) -> Tokenizer:
    if (source / "tokenizer.json").is_file():
        return read_tokenizer(source / "tokenizer.json")
    if getattr(model.config, "vocab_size", None) == Bytes.vocab_size:
        return Bytes()
    raise UserError(f"{source}: has no tokenizer.json, so --text cannot become tokens; put the tokenizer there")


def _tokens(path: Path, tokenizer: Tokenizer, most: int, seq_len: int) -> dict[str, Any]:
    """text [B, S] and the bytes that its targets stand for."""
    if seq_len < 2 or most < 2:
        raise UserError("--tokens and --seq-len must be at least 2")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror or error}") from None
    ids, lengths = tokenizer.encode(content)
    rows = min(most, len(ids)) // seq_len
    if not rows:
        if len(ids) < 2:
            raise UserError(f"{path}: {len(ids)} tokens are no text to compare models on")
        rows, seq_len = 1, min(most, len(ids))
    whole = torch.from_numpy(ids[: rows * seq_len].copy()).view(rows, seq_len)
    met = torch.from_numpy(lengths[: rows * seq_len].copy()).view(rows, seq_len)[:, 1:]
    return {"text": whole, "num_bytes": int(met.sum())}
