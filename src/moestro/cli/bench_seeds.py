"""`moestro bench seeds`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro

from ..train.presets import DEFAULT
from .find import find
from .override import override
from .parse import Settings, parse
from .style import print_table

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Train a preset's sparse model and its dense twin once per seed; show the paired difference with its 95 percent
    interval. The record is written after every seed; the same command goes on with the seeds that are missing."""

    preset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PRESET")]] = DEFAULT
    """Preset, run folder or config.json."""
    out: Path
    """File of the record, JSON."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One training of both models for each."""
    keep: Path | None = None
    """Folder to keep the runs in; None = they are removed."""
    set: Settings = ()
    """PATH=VALUE: change the preset first, as in moestro train."""
    json: bool = False
    """Print one line of JSON on stdout; everything else goes to stderr."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="bench seeds")
    config = override(find(options.preset), options.set)
    from ..bench.seeds import measure

    record = measure(config, options.seeds, options.out, lambda line: print(line, file=sys.stderr), keep=options.keep)
    _show(sys.stderr if options.json else sys.stdout, record)
    if options.json:
        print(json.dumps(record))
    return 0


def _show(stream: TextIO, record: dict[str, Any]) -> None:
    rows = []
    for seed, entry in record["seeds"].items():
        ends = [f"{entry['table'][name]['bits_per_byte']:.4f}" for name in ("sparse", "dense")]
        rows.append([seed, *ends, f"{entry['difference']:+.4f}", f"{entry['minutes']:.1f}"])
    columns = ["seed", "sparse, bits per byte", "dense twin, bits per byte", "difference", "minutes"]
    print_table(stream, "Validation at equal steps", columns, rows)
    summary = record["summary"]
    for name, what in (("equal_steps", "equal steps"), ("equal_time", "equal training time")):
        if name in summary:
            s = summary[name]
            print(f"sparse minus dense at {what}: {s['mean']:+.4f} [{s['low']:+.4f}, {s['high']:+.4f}]", file=stream)
    if "verdict" in summary:
        print(f"{record['claim']}: {summary['verdict']}", file=stream)
