"""`moestro presets`: what is known by name."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..models.published import PUBLISHED
from ..train.presets import DEFAULT, PRESETS
from .parse import parse
from .style import print_table

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """List the presets that moestro train takes, and the published models that moestro info knows."""

    json: bool = False
    """Print one line of JSON: every preset with all its settings."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="presets")
    if options.json:
        known: dict[str, dict[str, Any]] = {
            "presets": {name: make().to_dict() for name, make in PRESETS.items()},
            "published": {name: make().to_dict() for name, make in PUBLISHED.items()},
        }
        print(json.dumps({"default": DEFAULT, **known}))
        return 0
    columns = ["name", "what it is"]
    note = f"Without a name, moestro train takes {DEFAULT}. moestro train NAME --help lists its settings."
    print_table(sys.stdout, "Presets: moestro train NAME", columns, _rows(PRESETS), note, left=2)
    print_table(sys.stdout, "Published models: moestro info NAME", columns, _rows(PUBLISHED), left=2)
    return 0


def _rows(known: dict[str, Callable[[], Any]]) -> list[list[str]]:
    return [[name, (make.__doc__ or "").strip().split("\n")[0]] for name, make in known.items()]
