"""The picture of a record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.files import write
from ..report.figures.bars import Bar, Panel, draw_bars

__all__ = ["draw", "panels"]

MOST = 12  # regimes up to which all are shown
UNITS = {"cold decode": "ms per layer", "whole model": "ms per token", "train": "ms per step"}


def panels(record: Mapping[str, Any]) -> list[Panel]:
    """One panel per regime, the fastest contender on top. Routers are left to the tables; so are, where there are many
    regimes, the routings after the first."""
    found = []
    several = len(record["regimes"]) > MOST
    first = next((r["routing"] for r in record["regimes"].values() if r["kind"] != "router" and "routing" in r), None)
    for name, regime in record["regimes"].items():
        if regime["kind"] == "router" or (several and regime.get("routing", first) != first):
            continue
        bars = [_bar(who, row, regime["ours"]) for who, row in regime["rows"].items() if "milliseconds" in row]
        if bars:
            unit = UNITS.get(regime["kind"], "ms")
            found.append(Panel(name, f"{unit} (median, quartiles)", sorted(bars, key=lambda b: b.value)))
    return found


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Write `path`.svg and `path`.png; nothing where nothing was timed."""
    content = panels(record)
    if not content:
        return
    machine = record["machine"]
    title = f"{record['what']}: {machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}"
    for form, data in draw_bars(content, title).items():
        write(path.with_suffix(f".{form}"), data)


def _bar(name: str, row: Mapping[str, Any], ours: str) -> Bar:
    ms = row["milliseconds"]
    mine = name.startswith(ours.split(" ")[0])
    kind = "floor" if name.startswith("read once") else "ours" if mine else "bar" if row.get("bar") else "other"
    return Bar(name, ms["median"], ms["low"], ms["high"], kind)
