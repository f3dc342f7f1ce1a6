"""Labels for text: what kind of character a byte is, and roughly which kind of Python token it belongs to.

Any bytes are accepted. A label is the index of a name in `CHARACTERS` or `PYTHON`. Label a whole file before cutting
windows from it where you can: a window that starts inside a string has its Python labels turned inside out.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.errors import UserError
from .tables import Array

__all__ = ["CHARACTERS", "PYTHON", "character_labels", "labels_of_tokens", "python_labels"]

CHARACTERS = (
    "lowercase",
    "uppercase",
    "digit",
    "underscore",
    "space",
    "newline, indent",
    "bracket",
    "quote",
    "operator",
    "punctuation",
    "non-ASCII",
    "control",
)

PYTHON = ("keyword", "identifier", "number", "string", "comment", "operator", "space", "newline, indent", "other")


def _byte_table() -> Array:
    table = np.full(256, CHARACTERS.index("control"), np.int8)
    kinds = {
        "lowercase": b"abcdefghijklmnopqrstuvwxyz",
        "uppercase": b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "digit": b"0123456789",
        "underscore": b"_",
        "space": b" \t",
        "newline, indent": b"\n\r\f\v",
        "bracket": b"()[]{}",
        "quote": b"\"'`",
        "operator": b"+-*/%=<>!&|^~@",
        "punctuation": b".,;:?#$\\",
        "non-ASCII": bytes(range(128, 256)),
    }
    for name, members in kinds.items():
        table[list(members)] = CHARACTERS.index(name)
    return table


_BYTES = _byte_table()

_SCAN = re.compile(
    rb"""
    (?P<comment>\#[^\n]*)
    | (?P<string>(?:[rRbBuUfFtT]{0,2})
        (?: \"\"\"(?:[^\\]|\\.)*?(?:\"\"\"|\\?\Z) | '''(?:[^\\]|\\.)*?(?:'''|\\?\Z)
          | \"(?:[^\\\n\"]|\\.)*(?:\"|(?=\n)|\\?\Z) | '(?:[^\\\n']|\\.)*(?:'|(?=\n)|\\?\Z) ))
    | (?P<number>(?:0[xXoObB][0-9a-fA-F_]+|(?:\d[\d_]*)?\.?\d[\d_]*\.?(?:[eE][+-]?\d+)?)[jJ]?)
    | (?P<name>[A-Za-z_\x80-\xff][A-Za-z0-9_\x80-\xff]*)
    | (?P<newline>(?:[\r\n\f\v][ \t]*)+)
    | (?P<space>[ \t]+)
    | (?P<operator>[-+*/%=<>!&|^~@()\[\]{}.,;:]+)
    """,
    re.VERBOSE | re.DOTALL,
)

_KEYWORDS = frozenset(word.encode() for word in keyword.kwlist)
_GROUPS = {"newline": "newline, indent", "name": "identifier"}


def character_labels(data: Any) -> Array:
    """bytes or byte values [N] -> [N] int8, indices into CHARACTERS; ids over 255 (specials) become -1.

    White space between a line break, or the start, and the first other character of the line is indentation.
    """
    values = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.asarray(data).reshape(-1)
    labels = np.where((values >= 0) & (values < 256), _BYTES[np.clip(values, 0, 255)], -1).astype(np.int8)
    blank, line = CHARACTERS.index("space"), CHARACTERS.index("newline, indent")
    # the last position that is no blank decides: a line break (or nothing) makes the blanks after it indentation
    position = np.arange(len(labels))
    last = np.maximum.accumulate(np.where(labels == blank, -1, position)) if len(labels) else position
    indent = (labels == blank) & ((last < 0) | (labels[np.maximum(last, 0)] == line))
    labels[indent] = line
    return labels


def python_labels(data: bytes) -> Array:
    """bytes -> [N] int8, indices into PYTHON, from a scanner that never fails; not a parser."""
    labels = np.full(len(data), PYTHON.index("other"), np.int8)
    for match in _SCAN.finditer(data):
        group = match.lastgroup or ""
        name = "keyword" if group == "name" and match.group() in _KEYWORDS else _GROUPS.get(group, group)
        labels[match.start() : match.end()] = PYTHON.index(name)
    return labels


def labels_of_tokens(labels: Array, lengths: Sequence[int] | Array) -> Array:
    """Labels of bytes [N] and bytes per token [T] -> labels of tokens [T] int16.

    A token has the label of most of its bytes, the lower one if two are equal, and -1 without bytes (specials).
    """
    lengths = np.asarray(lengths, np.int64)
    if int(lengths.sum()) != len(labels):
        raise UserError(f"the tokens cover {int(lengths.sum())} bytes, but {len(labels)} are labelled")
    kinds = int(labels.max(initial=0)) + 1
    owner = np.repeat(np.arange(len(lengths)), lengths)
    votes = np.bincount(owner * kinds + labels, minlength=len(lengths) * kinds).reshape(len(lengths), kinds)
    return np.where(lengths > 0, votes.argmax(1), -1).astype(np.int16)
