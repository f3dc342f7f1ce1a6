"""`moestro reproduce`: a published system against its baselines at equal compute."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ..papers.registry import comparison
from ..papers.tables import about, tables
from .parse import parse
from .style import print_table

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Train a published system and its baselines at equal compute, with several seeds; say whether its claim holds.
    The record is written after every run; the same command goes on with the runs that are missing."""

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
    """Name or number of a system, see moestro papers."""
    smoke: bool = False
    """Seconds instead of minutes: the same code on a few rows of its own; shows that it runs, decides nothing."""
    seeds: int | None = None
    """How many seeds; None = 3, and 1 in a smoke run. A verdict needs three."""
    out: Path | None = None
    """Folder of record.json and picture.svg; None = runs/reproduce/NAME."""
    data: Path | None = None
    """Folder of the data; None = $MOESTRO_DATA, else the user's cache folder."""
    json: bool = False
    """Print one line of JSON on stdout; everything else goes to stderr."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="reproduce")
    found = comparison(options.name)
    slug = found.entry.slug
    out = options.out or Path("runs") / "reproduce" / (f"{slug}-smoke" if options.smoke else slug)
    from ..papers.run import reproduce
    from .progress_runs import watching

    with contextlib.closing(watching(sys.stderr)) as watch:
        record = reproduce(
            found,
            out,
            seeds=options.seeds if options.seeds is not None else (1 if options.smoke else 3),
            smoke=options.smoke,
            data=options.data,
            watch=watch,
            command=shlex.join(["moestro", "reproduce", *args]),
        )
    stream = sys.stderr if options.json else sys.stdout
    print(f"{found.entry.number:02d} {slug}: {found.entry.title} ({found.entry.year})", file=stream)
    print(about(record), file=stream)
    for table in tables(record):
        print_table(stream, table.title, table.columns, table.rows, table.note, left=table.left)
    for note in record["summary"]["notes"]:
        print(note, file=stream)
    print(f"verdict: {record['summary']['verdict']}; record and picture are in {out}", file=stream)
    if options.json:
        print(json.dumps(record))
    return 0
