"""`moestro bench layer`."""

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
    """Time of one layer of experts, forward, and forward and backward: ours, a plain loop, dense layers of equal active
    width (K*F) and of equal parameters (E*F), and with --peers transformers' experts. Same weights, same choices, in
    turns, after a check of outputs and gradients against float64. Routers are timed apart."""

    peers: bool = False
    """Also transformers' experts, uncompiled and compiled; absent ones get a row that says so."""
    shape: tuple[int, int, int, int] = (512, 256, 32, 4)
    """D F E K: model width, expert width, experts, choices per token. The standard shape also has the big case, 4096
    tokens to 8 of 64 experts."""
    tokens: tuple[int, ...] = (1, 64, 256, 2048, 4096)
    """Numbers of tokens."""
    routings: tuple[Literal["balanced", "zipf", "idle"], ...] = ("balanced", "zipf", "idle")
    """Kinds of routing; those after the first are measured at 256 and 2048 tokens and in the big case."""
    only: str = ""
    """Measure regimes with this in their names only, such as "forward + backward, T 64"."""
    rounds: int = 15
    """How often every contender has its turn."""
    budget: float = 8.0
    """Seconds that all rounds of one contender may take in a regime; it takes part in three at least."""
    seed: int = 0
    """Seed of weights, inputs and routings."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and inputs."""
    threads: int = 0
    """CPU threads; 0 = as torch chooses."""
    out: Path | None = None
    """Folder to write record.json, picture.svg and picture.png into."""
    json: bool = False
    """Print one line of JSON on stdout; the tables go to stderr."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="bench layer")
    import torch

    from ..bench.layer import cases, measure
    from ..bench.tables import regime_tables

    record = measure(
        cases(options.shape, options.tokens, options.routings),
        rounds=options.rounds,
        peers=options.peers,
        seed=options.seed,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        threads=options.threads,
        only=options.only,
        budget=options.budget,
        say=say,
    )
    return present(record, regime_tables(record), options.out, options.json)
