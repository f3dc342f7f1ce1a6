"""The picture of a comparison: SVG and PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.files import write
from ..report.figures.bars import Bar, Panel, draw_bars
from ..report.figures.lines import Curve, draw_curves
from .paper import Bars, Lines

__all__ = ["averaged", "draw", "panels"]


def draw(record: Mapping[str, Any], picture: Bars | Lines, path: Path) -> None:
    """Write `path`.svg and `path`.png; nothing where no arm has what is to be drawn."""
    number = len(record["seeds"])
    title = f"{record['number']:02d} {record['slug']}: mean of {number} seed{'s' if number > 1 else ''}"
    if record["smoke"]:
        title += " (smoke run)"
    if isinstance(picture, Lines):
        curves = averaged(record, picture)
        made = draw_curves(curves, title, picture.x, picture.y) if curves else {}
    else:
        content = panels(record, picture)
        made = draw_bars(content, title) if content else {}
    for form, data in made.items():
        write(path.with_suffix(f".{form}"), data)


def panels(record: Mapping[str, Any], picture: Bars) -> list[Panel]:
    """One panel per figure; arms without it are left out."""
    found = []
    for name in picture.figures:
        bars = []
        for arm, figures in record["summary"]["arms"].items():
            if name in figures:
                mean, spread = figures[name]["mean"], figures[name]["spread"]
                kind = "ours" if arm == record["settings"]["system"] else "other"
                bars.append(Bar(arm, mean, mean - spread, mean + spread, kind))
        if bars:
            found.append(Panel(name, record["summary"]["figures"][name], bars))
    return found


def averaged(record: Mapping[str, Any], picture: Lines) -> list[Curve]:
    """One curve per arm: the mean of its seeds at every x that all of them have."""
    found = []
    for arm, runs in record["runs"].items():
        curves = [
            dict(map(tuple, r["curves"][picture.curve])) for r in runs.values() if picture.curve in r.get("curves", {})
        ]
        known = [x for x in curves[0] if all(c.get(x) is not None for c in curves)] if curves else []
        if known:
            found.append(Curve(arm, [(x, math.fsum(c[x] for c in curves) / len(curves)) for x in sorted(known)]))
    return found
