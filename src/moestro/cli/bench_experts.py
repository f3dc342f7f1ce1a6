"""`moestro bench experts`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .bench_show import present, say
from .parse import parse

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time of experts classes of transformers, forward, and forward and backward: computed by Moestro, as
    `experts_implementation="moestro"`, and by transformers' grouped_mm. Same module, same choices, in turns, after a
    check of outputs and gradients against the class's own forward in float64."""

    classes: tuple[Literal["Qwen3-MoE", "Mixtral", "GPT-OSS", "Nemotron-H", "Muse Spark"], ...] = (
        "Qwen3-MoE",
        "Mixtral",
        "GPT-OSS",
        "Nemotron-H",
        "Muse Spark",
    )
    """Whose experts."""
    peers: bool = False
    """Also transformers' batched_mm and eager."""
    shape: tuple[int, int, int, int] = (512, 256, 32, 4)
    """D F E K: model width, expert width, experts, choices per token."""
    tokens: tuple[int, ...] = (1, 64, 2048)
    """Numbers of tokens."""
    only: str = ""
    """Measure regimes with this in their names only, such as "forward, Mixtral, T 64"."""
    rounds: int = 15
    """How often every contender has its turn."""
    seed: int = 0
    """Seed of weights, inputs and routings."""
    threads: int = 0
    """CPU threads; 0 = as torch chooses."""
    out: Path | None = None
    """The file to write the record into, such as results/bench-experts.json."""
    json: bool = False
    """Print one line of JSON on stdout; the tables go to stderr."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="bench experts")
    from ..bench.experts import measure
    from ..bench.tables import regime_tables
    from ..train.files import write_json

    record = measure(
        classes=options.classes,
        shape=options.shape,
        tokens=options.tokens,
        rounds=options.rounds,
        seed=options.seed,
        threads=options.threads,
        only=options.only,
        everybody=options.peers,
        say=say,
    )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, record)
    return present(record, regime_tables(record), None, options.json)
