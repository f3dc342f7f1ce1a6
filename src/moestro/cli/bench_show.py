"""What the measurements have in common on the command line: progress, tables, goals, and the files of a record."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..bench.tables import Table, about, goals_table
from .style import print_table

__all__ = ["footer", "present", "print_goals", "print_json", "say", "show", "write"]


def say(line: str) -> None:
    """Show what is being measured, on terminals, in one line that overwrites itself; warnings stay, everywhere."""
    if line.startswith("warning"):
        print(line, file=sys.stderr, flush=True)
    elif sys.stderr.isatty():
        print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)


def show(stream: TextIO, table: Table, left: int = 1) -> None:
    print_table(stream, table.title, table.columns, table.rows, "\n".join(table.notes), left=left)


def print_goals(stream: TextIO, record: Mapping[str, Any]) -> None:
    if record["goals"]:
        show(stream, goals_table([record]), left=3)


def footer(stream: TextIO, record: Mapping[str, Any]) -> None:
    """Machine, versions, load and memory."""
    print(about(record), file=stream)


def write(out: Path | None, record: Mapping[str, Any]) -> None:
    """record.json and its picture, as SVG and PNG, into a folder that is made if need be."""
    if out is None:
        return
    from ..bench.picture import draw
    from ..train.files import write_json

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "record.json", record)
    draw(record, out / "picture")


def print_json(record: Mapping[str, Any]) -> None:
    print(json.dumps(record))


def present(record: Mapping[str, Any], tables: Iterable[Table], out: Path | None, json_wanted: bool) -> int:
    """Everything about a finished record: its files, its tables and goals, and one line of JSON where it is wanted."""
    say("")
    write(out, record)
    stream = sys.stderr if json_wanted else sys.stdout
    for table in tables:
        show(stream, table)
    print_goals(stream, record)
    footer(stream, record)
    if json_wanted:
        print_json(record)
    return 0
