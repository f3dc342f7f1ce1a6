"""`moestro bench`: measurements that anybody can repeat."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ..core.errors import UserError, did_you_mean

__all__ = ["KINDS", "main"]

KINDS = {
    "layer": "one layer of experts against other implementations, dense layers and a plain loop",
    "experts": "experts classes of transformers: computed by Moestro and by transformers",
    "decode": "one token at a time: cold layers against reading their weights once, and a whole model",
    "train": "training speed against the dense twin, transformers' experts and transformers' model; train routing: "
    "routing methods against plain top-k",
    "widths": "what experts of unequal widths cost",
    "seeds": "whether the sparse model beats its dense twin, over several seeds",
}


def main(args: Sequence[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<9}{what}" for name, what in KINDS.items())
        print(f"usage: moestro bench KIND [-h] [OPTIONS]\n\nkinds:\n{lines}\n\n  moestro bench KIND --help   options\n")
        return 0
    kind, *rest = args
    if kind not in KINDS:
        raise UserError(f"unknown measurement {kind!r}{did_you_mean(kind, KINDS)}; known: {', '.join(KINDS)}")
    return importlib.import_module(f"{__package__}.bench_{kind}").main(rest)
