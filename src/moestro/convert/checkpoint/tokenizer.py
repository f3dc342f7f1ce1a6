"""Tokenizer files beside a model: copied from another folder, or the library's bytes in the tokenizers format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from .folder import check_inside

__all__ = ["BYTES", "FILES", "byte_characters", "byte_files", "write_tokenizer"]

BYTES = "bytes"
"""The library's own tokenizer: 256 ids, one per byte."""

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


def write_tokenizer(folder: str | Path, source: str | Path | None, *, needed: bool = True) -> list[str]:
    """Put a tokenizer's files into `folder`: those of the folder `source`, or of bytes. Returns their names.

    source "bytes" stands for the library's tokenizer of bytes. Raises `UserError` where `needed` and there are none.
    """
    if source is None:
        return []
    folder = Path(folder)
    if source == BYTES:
        made = byte_files()
        for name, content in made.items():
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return list(made)
    copied = [name for name in FILES if (Path(source) / name).is_file()]
    if needed and not copied:
        raise UserError(f"{source}: holds no tokenizer files ({', '.join(FILES[:2])}, ...); name a folder that does")
    for name in copied:
        check_inside(Path(source) / name, Path(source))
        shutil.copyfile(Path(source) / name, folder / name)
    return copied


def byte_characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (Radford et al. 2019): printable Latin-1
    characters for themselves, those from U+0100 on for the others, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def byte_files() -> dict[str, Any]:
    """Name -> JSON of a tokenizer whose ids are the bytes of the text, for tokenizers and transformers to load.

    No character is lost or changed: nothing is normalised, split, merged, added or special.
    """
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary = byte_characters()
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": about}
