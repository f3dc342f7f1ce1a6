"""`moestro bench widths`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .parse import parse
from .style import print_table

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time of a bank whose experts have unequal widths over that of the bank of equal ones, forward and backward."""

    rounds: int = 25
    """How often both banks have their turn."""
    out: Path | None = None
    """File of the record, JSON."""
    json: bool = False
    """Print one line of JSON on stdout; the table goes to stderr."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="bench widths")
    from ..bench.widths import measure
    from ..train.files import write_json

    record = measure(options.rounds)
    if options.out is not None:
        write_json(options.out, record)
    rows = []
    for shape in record["shapes"]:
        times = shape["times"]
        sizes = [str(shape[name]) for name in ("dim", "experts", "width", "units")]
        rows.append([*sizes, f"{times['median']:.3f}", f"{times['low']:.3f}..{times['high']:.3f}"])
    columns = ["D", "E", "F", "T", "times as long", "quartiles"]
    print_table(sys.stderr if options.json else sys.stdout, "Unequal widths against equal ones", columns, rows, left=4)
    if options.json:
        print(json.dumps(record))
    return 0
