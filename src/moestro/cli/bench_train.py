"""`moestro bench train`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import tyro

from ..bench.tables import regime_tables
from ..train.presets import DEFAULT
from .bench_show import footer, print_goals, print_json, say, show, write
from .find import find
from .override import override
from .parse import Settings, parse

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Training tokens per second of a preset's sparse model, of its dense twin of equal active FLOPs per token, and of
    the same model with transformers' experts in place of ours: same weights, batches and optimiser, in turns.

    moestro bench train routing: steps of published routing methods against plain top-k layers instead."""

    preset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PRESET")]] = DEFAULT
    """Preset, run folder or config.json."""
    rounds: int = 7
    """How often every contender has its turn."""
    steps: int | None = None
    """Optimiser steps of a turn; None = 3, or 1 of a model with over 20 million parameters."""
    against: tuple[Literal["transformers model", "grouped_mm", "grouped_mm compiled", "batched_mm", "eager"], ...] = (
        "transformers model",
        "grouped_mm",
        "grouped_mm compiled",
        "batched_mm",
        "eager",
    )
    """The whole of transformers' model, and ours with transformers' experts of these kinds; absent ones get a row that
    says so."""
    seed: int | None = None
    """Seed of initial values and data order; None = the preset's."""
    device: str | None = None
    """cpu, cuda, ...; None = the preset's."""
    threads: int | None = None
    """CPU threads; None = the preset's."""
    set: Settings = ()
    """PATH=VALUE: change the preset first, as in moestro train."""
    out: Path | None = None
    """Folder to write record.json, picture.svg and picture.png into."""
    json: bool = False
    """Print one line of JSON on stdout; the tables go to stderr."""


def main(args: Sequence[str]) -> int:
    if args[:1] == ["routing"]:
        from .bench_routing import main as routing

        return routing(args[1:])
    options = parse(Options, args, verb="bench train")
    run = override(find(options.preset), options.set)
    given = {"seed": options.seed, "device": options.device, "threads": options.threads}
    run = run.replace(**{name: value for name, value in given.items() if value is not None})

    from ..bench.train import measure

    name = " ".join(
        [options.preset, *(f"--set {change}" for change in options.set)]
    )  # goals speak of presets as they are
    record = measure(run, options.rounds, options.steps, say, options.against, name)
    say("")
    write(options.out, record)
    stream = sys.stderr if options.json else sys.stdout
    _show(stream, record)
    print_goals(stream, record)
    footer(stream, record)
    if options.json:
        print_json(record)
    return 0


def _show(stream: TextIO, record: dict[str, Any]) -> None:
    for table in regime_tables(record):
        show(stream, table)
    for to, r in record["ratios"].items():
        print(
            f"sparse is {r['median']:.3f} times as fast as {to} "
            f"(median of {record['rounds']} rounds; quartiles {r['low']:.3f}..{r['high']:.3f}; "
            f"fastest turns {r['fastest']:.3f})",
            file=stream,
        )
