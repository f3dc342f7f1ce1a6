"""`moestro bench train`."""

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
from .style import count, print_table, size

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Training tokens per second of a preset's sparse model, of its dense twin of equal active FLOPs per token, and of
    the same model with transformers' experts in place of ours: same weights, batches and optimiser, in turns."""

    preset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PRESET")]] = DEFAULT
    """Preset, run folder or config.json."""
    rounds: int = 7
    """How often every contender has its turn."""
    steps: int = 3
    """Optimiser steps of a turn."""
    seed: int | None = None
    """Seed of initial values and data order; None = the preset's."""
    device: str | None = None
    """cpu, cuda, ...; None = the preset's."""
    threads: int | None = None
    """CPU threads; None = the preset's."""
    set: Settings = ()
    """PATH=VALUE: change the preset first, as in moestro train."""
    out: Path | None = None
    """Folder to write the record into, as bench-train.json."""
    json: bool = False
    """Print one line of JSON on stdout; the table goes to stderr."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="bench train")
    run = override(find(options.preset), options.set)
    given = {"seed": options.seed, "device": options.device, "threads": options.threads}
    run = run.replace(**{name: value for name, value in given.items() if value is not None})
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)

    from ..bench.train import measure

    record = measure(run, options.rounds, options.steps, _say)
    _say("")
    text = json.dumps(record)
    if options.out is not None:
        (options.out / "bench-train.json").write_text(text + "\n", encoding="utf-8")
    _show(sys.stderr if options.json else sys.stdout, options.preset, record)
    if options.json:
        print(text)
    return 0


def _say(line: str) -> None:
    """Show what is being measured, on terminals, in one line that overwrites itself."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)


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
    machine, memory = record["machine"], record["peak_memory"]
    print(
        f"experts: forward and backward of the feed-forward layers, router included, timed apart; attention likewise; "
        f"rest: the remainder of the step\n"
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['instruction_set']}, {machine['device']}; "
        f"torch {machine['versions']['torch']}, transformers {machine['versions']['transformers']}; "
        f"peak memory of the process {size(memory['process'])}"
        + (f", of the accelerator {size(memory['accelerator'])}" if "accelerator" in memory else ""),
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
