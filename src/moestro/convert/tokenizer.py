"""Tokenizer files beside a model: copied from another folder, or the library's bytes in the tokenizers format."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..core.errors import UserError

__all__ = ["FILES", "write_tokenizer"]

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Names of files that make a tokenizer; none of them is code."""


def write_tokenizer(folder: Path, source: str | Path | None, *, needed: bool = True) -> list[str]:
    """Put a tokenizer's files into `folder`: those of the folder `source`, or of bytes. Returns their names.

    Raises `UserError` where `needed` and there are none.
    """
    if source is None:
        return []
    copied = [name for name in FILES if (Path(source) / name).is_file()]
    if needed and not copied:
        raise UserError(f"{source}: holds no tokenizer files ({', '.join(FILES[:2])}, ...); name a folder that does")
    for name in copied:
        shutil.copyfile(Path(source) / name, folder / name)
    return copied
