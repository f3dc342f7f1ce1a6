"""`moestro bench train routing`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from ..train.presets import DEFAULT
from .bench_show import present, say
from .find import find
from .parse import parse

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time of a training step with published routing methods in the routed layers of a preset's decoder, each beside
    plain top-k layers of equal active FLOPs: random experts, two passes (per pass), mixes, a random second choice with
    capacity, top-p, a frozen router with a schedule. All in turns, in one process."""

    preset: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PRESET")]] = DEFAULT
    """Preset, run folder or config.json of a decoder with routed layers; its layers are replaced."""
    rounds: int = 15
    """How often every contender has its turn."""
    steps: int = 3
    """Optimiser steps of a turn."""
    only: tuple[str, ...] = ()
    """Methods to measure, as the table names them; none = all."""
    seed: int | None = None
    """Seed of initial values and data order; None = the preset's."""
    device: str | None = None
    """cpu, cuda, ...; None = the preset's."""
    threads: int | None = None
    """CPU threads; None = the preset's."""
    out: Path | None = None
    """Folder to write record.json, picture.svg and picture.png into."""
    json: bool = False
    """Print one line of JSON on stdout; the tables go to stderr."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="bench train routing")
    run = find(options.preset)
    given = {"seed": options.seed, "device": options.device, "threads": options.threads}
    run = run.replace(**{name: value for name, value in given.items() if value is not None})

    from ..bench.routing import measure
    from ..bench.tables import regime_tables

    record = measure(run, options.rounds, options.steps, options.only, say)
    return present(record, regime_tables(record), options.out, options.json)
