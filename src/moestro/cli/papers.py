"""`moestro papers`: the published systems, how far each is, and how to use its parts."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..papers.catalogue import CATALOGUE, Entry, entry
from ..papers.registry import STATES, State, registered, state
from ..papers.tables import about, tables
from .parse import parse
from .style import print_table

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """List the published systems: what each adds, how far it is here, and the verdict of its last record. With a name:
    one system, its parts, and how to use them from Python."""

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]] = ""
    """Name or number of one system."""
    results: Path | None = None
    """Folder of records; None = results/papers of this checkout."""
    json: bool = False
    """Print one line of JSON instead."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="papers")
    if options.name:
        _one(entry(options.name), options)
    else:
        _all(options)
    return 0


def _all(options: Options) -> None:
    found = [(e, state(e, options.results)) for e in CATALOGUE.values()]
    if options.json:
        print(json.dumps([_plain(e, s) for e, s in found]))
        return
    rows = [
        [f"{e.number:02d}", e.slug, f"{e.title} ({e.year})\n{e.adds}", _word(s), s.verdict or "–"] for e, s in found
    ]
    note = "; ".join(f"{word}: {meaning}" for word, meaning in STATES.items()).replace("`", "")
    columns = ["no.", "name", "title (year), and what it adds", "state", "verdict"]
    print_table(
        sys.stdout,
        "Published systems: moestro papers NAME shows one",
        columns,
        rows,
        f"States. {note}. Figures: parts that are there. Verdict: of the last record.",
        left=5,
    )


def _one(found: Entry, options: Options) -> None:
    now = state(found, options.results)
    made = registered(found)
    if options.json:
        print(json.dumps(_plain(found, now) | {"example": made.example if made else None, "record": now.record}))
        return
    print(f"{found.number:02d} {found.slug}: {found.title} ({found.year}, https://arxiv.org/abs/{found.arxiv})")
    print(f"adds: {found.adds}")
    print(f"state: {_word(now)} ({STATES[now.word].replace('`', '')})")
    if now.parts:
        rows = [[what, name or "still to be written", _about(name)] for what, name in now.parts.items()]
        print_table(sys.stdout, "Parts, for any model", ["part", "where", "what it is"], rows, left=3)
        print("From Python:\n")
        print("\n".join(f"    {line}" for line in (made.example if made else _imports(now)).strip().splitlines()))
    if made is not None:
        print(f"\nmoestro reproduce {found.slug} compares it with its baselines; --smoke takes seconds")
        if made.preset:
            print(f"moestro train {made.preset} --data YOURS trains it on your own text")
    if now.record is not None:
        print(f"\n{now.record['command']}: {about(now.record)}\n")
        for table in tables(now.record):
            print_table(sys.stdout, table.title, table.columns, table.rows, table.note, left=table.left)


def _word(found: State) -> str:
    there = sum(map(bool, found.parts.values()))
    return f"{found.word} {there}/{len(found.parts)}" if found.word == "planned" and there else found.word


def _about(name: str) -> str:
    from ..papers.paper import describe_part

    return describe_part(name) if name else ""


def _imports(found: State) -> str:
    modules: dict[str, list[str]] = {}
    for name in sorted(filter(None, found.parts.values())):
        module, _, attribute = name.partition(":")
        modules.setdefault(module, []).append(attribute)
    return "\n".join(f"from {module} import {', '.join(names)}" for module, names in modules.items())


def _plain(found: Entry, now: State) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"state": now.word, "verdict": now.verdict or None, "parts": now.parts}
