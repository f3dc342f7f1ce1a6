"""`moestro bench decode`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from .bench_show import present, say
from .parse import parse

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Time of decoding one token with weights that no cache holds: several layers of distinct experts, rotating tokens;
    ours with weights in fp32, bf16, int8 and int4, a plain loop, compiled gathers, with --peers transformers' experts,
    and the time to read what a token touches once. Then a whole small model, ours and transformers', which must
    generate the same tokens."""

    peers: bool = False
    """Also transformers' experts and models; absent ones get a row that says so."""
    shape: tuple[int, int, int, int] = (512, 256, 32, 4)
    """D F E K: model width, expert width, experts, choices per token."""
    layers: int = 8
    """Layers of distinct weights."""
    tokens: int = 64
    """Tokens that rotate."""
    passes: int = 3
    """How often every token comes round."""
    model_rounds: int = 5
    """Prompts that the whole model continues; 0 = leave it out."""
    new_tokens: int = 64
    """Tokens to generate for each."""
    seed: int = 0
    """Seed of weights, tokens and routings."""
    threads: int = 0
    """CPU threads; 0 = as torch chooses."""
    out: Path | None = None
    """Folder to write record.json, picture.svg and picture.png into."""
    json: bool = False
    """Print one line of JSON on stdout; the tables go to stderr."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="bench decode")
    from ..bench.decode import measure
    from ..bench.tables import regime_tables

    record = measure(
        options.shape,
        layers=options.layers,
        tokens=options.tokens,
        passes=options.passes,
        model_rounds=options.model_rounds,
        new_tokens=options.new_tokens,
        peers=options.peers,
        seed=options.seed,
        threads=options.threads,
        say=say,
    )
    return present(record, regime_tables(record), options.out, options.json)
