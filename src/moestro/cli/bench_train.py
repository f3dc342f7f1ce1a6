"""`moestro bench train`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import tyro

from ..train.presets import DEFAULT
from .bench_show import footer, print_goals, print_json, say, write
from .find import find
from .override import override
from .parse import Settings, parse
from .style import count, print_table

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Training tokens per second of a preset's sparse model, of its dense twin of equal active FLOPs per token, and of
    the same model with transformers' experts in place of ours: same weights, batches and optimiser, in turns."""

    preset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PRESET")]] = DEFAULT
    """Preset, run folder or config.json."""
    rounds: int = 7
    """How often every contender has its turn."""
    steps: int | None = None
    """Optimiser steps of a turn; None = 3, or 1 of a model with over 20 million parameters."""
    against: tuple[Literal["grouped_mm", "grouped_mm compiled", "batched_mm", "eager"], ...] = (
        "grouped_mm",
        "grouped_mm compiled",
        "batched_mm",
        "eager",
    )
    """Which of transformers' experts; absent ones get a row that says so."""
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
    options = parse(Options, args, verb="bench train")
    run = override(find(options.preset), options.set)
    given = {"seed": options.seed, "device": options.device, "threads": options.threads}
    run = run.replace(**{name: value for name, value in given.items() if value is not None})

    from ..bench.train import measure

    record = measure(run, options.rounds, options.steps, say, options.against, options.preset)
    say("")
    write(options.out, record)
    stream = sys.stderr if options.json else sys.stdout
    _show(stream, options.preset, record)
    print_goals(stream, record)
    footer(stream, record)
    if options.json:
        print_json(record)
    return 0


def _show(stream: TextIO, name: str, record: dict[str, Any]) -> None:
    print_table(
        stream,
        f"Training speed of {name}, {count(record['parameters'])} parameters, seed {record['seed']}",
        ["", "tokens/s", "quartiles", "fastest", "step ms", "experts ms", "attention ms", "rest ms", "same step"],
        [[who, *_cells(row)] for who, row in record["rows"].items()],
    )
    for to, r in record["ratios"].items():
        print(
            f"sparse is {r['median']:.3f} times as fast as {to} "
            f"(median of {record['rounds']} rounds; quartiles {r['low']:.3f}..{r['high']:.3f}; "
            f"fastest turns {r['fastest']:.3f})",
            file=stream,
        )
    print(
        "experts: forward and backward of the feed-forward layers, router included, timed apart; attention likewise; "
        "rest: the remainder of the step",
        file=stream,
    )


def _cells(row: dict[str, Any]) -> list[str]:
    if "absent" in row:
        return [f"not run: {row['absent']}", *[""] * 7]
    if not row.get("agrees", True):
        return [f"not run: its gradients differ ({row['where']}: {row['worst']})", *[""] * 7]
    speed = row["tokens_per_second"]
    parts = [f"{1000 * row[f'{part}_seconds']:.1f}" for part in ("step", "experts", "attention", "rest")]
    same = f"{row['worst']:.0e}" if "worst" in row else ""
    speeds = [f"{speed['median']:.0f}", f"{speed['low']:.0f}..{speed['high']:.0f}", f"{speed['most']:.0f}"]
    return [*speeds, *parts, same]
