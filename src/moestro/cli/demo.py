"""`moestro demo`: what the library does with a whole model, shown from beginning to end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..core.errors import UserError, did_you_mean
from .parse import parse
from .style import print_table

__all__ = ["KINDS", "main"]

KINDS = {"upcycle": "a small dense model becomes mixtures, trained on at equal FLOPs and given back to transformers"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Train a small dense model of the Llama type on text, turn it into mixtures of 8 experts by three methods, train
    all on beside it at equal active FLOPs, and export the best for transformers, which must write the same text."""

    out: Path = Path("upcycling")
    """A new folder for checkpoints, receipts, runs, record.json and its picture."""
    data: str | None = None
    """Text to learn from: a file, or a folder with text files. None = the source of Python's standard library."""
    steps: int = 1500
    """Steps of the dense model before it is converted, and of going on after that."""
    seed: int = 0
    """Seed of everything."""
    json: bool = False
    """Print one line of JSON on stdout; everything else goes to stderr."""


def main(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<9}{what}" for name, what in KINDS.items())
        print(f"usage: moestro demo KIND [-h] [OPTIONS]\n\nkinds:\n{lines}\n\n  moestro demo KIND --help   options\n")
        return 0
    kind, *rest = args
    if kind not in KINDS:
        raise UserError(f"unknown demonstration {kind!r}{did_you_mean(kind, KINDS)}; known: {', '.join(KINDS)}")
    options = parse(Options, rest, verb=f"demo {kind}")
    stream = sys.stderr if options.json else sys.stdout
    from ..bench.upcycle import DENSE, Upcycling, demonstrate, picture

    dense = DENSE.replace(steps=options.steps, seed=options.seed)
    if options.data is not None:
        from ..tasks.config import Text

        dense = dense.replace(data=Text(path=options.data))
    record = demonstrate(
        options.out,
        Upcycling(dense=dense, further=options.steps),
        say=lambda line: print(line, file=sys.stderr, flush=True),
        watch=_watch,
    )
    picture(record, options.out / "picture")
    _show(stream, record, options.out)
    if options.json:
        print(json.dumps(record))
    return 0


@contextlib.contextmanager
def _watch() -> Iterator[Any]:
    from .progress import watcher

    with contextlib.closing(watcher(sys.stderr)) as progress:
        yield progress


def _show(stream: TextIO, record: Mapping[str, Any], out: Path) -> None:
    from ..bench.tables import upcycling_table

    table = upcycling_table(record)
    print_table(stream, table.title, table.columns, table.rows, " ".join(table.notes))
    for name, arm in record["arms"].items():
        if "receipt" in arm:
            exact = arm["receipt"]["exact"] or "nothing is claimed to be exact"
            print(f"{name}: {exact}; {arm['receipt']['invented']} invented tensors", file=stream)
    made = record["exported"]
    print(
        f"\n{record['best']} as {made['family']}: transformers alone loads a {made['loaded_as']} and writes the same "
        f"{made['tokens_equal']} tokens:\n\n{made['text']}\n",
        file=stream,
    )
    print(f"everything is in {out}; {record['minutes']:.1f} minutes", file=stream)
