"""Which systems have their parts, their file and their record here. No torch here."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any, Literal

from ..core.errors import UserError
from .catalogue import CATALOGUE, Entry, entry
from .paper import Paper
from .parts import PARTS

__all__ = ["STATES", "State", "comparison", "records", "registered", "state"]

STATES = {
    "planned": "parts are missing, or nobody has named them yet",
    "parts": "all parts are there, for any model; no comparison yet",
    "ready": "`moestro reproduce` runs its comparison; nothing is recorded yet",
    "recorded": "a full run of three seeds or more is recorded",
}


@dataclasses.dataclass(frozen=True)
class State:
    """How far a system is: a word of `STATES`; its parts (what -> `module:Name`, empty where missing); the verdict of
    the last record, and the record itself, where there is one."""

    word: Literal["planned", "parts", "ready", "recorded"]
    parts: dict[str, str]
    verdict: str = ""
    record: dict[str, Any] | None = None


def registered(found: Entry) -> Paper | None:
    """The system's comparison, where it has one."""
    name = f"{__package__}.{found.module}"
    try:
        made = importlib.import_module(name).PAPER
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
    if not isinstance(made, Paper) or made.entry != found:
        raise UserError(f"{name}.PAPER must be the Paper of {found.slug}")
    return made


def comparison(name: str) -> Paper:
    """The comparison of the system with this slug or number. Raises `UserError` where there is none."""
    found = entry(name)
    made = registered(found)
    if made is None:
        known = [e.slug for e in CATALOGUE.values() if registered(e) is not None]
        others = f"those that can be reproduced: {', '.join(known)}" if known else "no system has one yet"
        raise UserError(f"{found.slug} has no comparison yet ({state(found).word}); {others}")
    return made


def records() -> Path | None:
    """The folder of committed records, results/papers of a checkout; None in an installation without one."""
    root = Path(__file__).parents[3]
    return root / "results" / "papers" if (root / "pyproject.toml").is_file() else None


def state(found: Entry, folder: Path | None = None) -> State:
    """How far a system is. folder: of the records, default `records()`."""
    folder = folder or records()
    made = registered(found)
    if made is None:
        parts = dict(PARTS.get(found.slug, {}))
        return State("parts" if parts and all(parts.values()) else "planned", parts)
    parts = dict(made.parts)
    file = None if folder is None else folder / found.slug / "record.json"
    if file is None or not file.is_file():
        return State("ready", parts)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        verdict = record["summary"]["verdict"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: damaged, it is no record; restore the file from a copy") from None
    return State("recorded" if record["complete"] else "ready", parts, verdict, record)
