"""Bars with quartile whiskers, one panel per comparison, as files: SVG and PNG in the page's light theme."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .draw import clip, panels
from .file import SeveralForms, light, picture_file

__all__ = ["Bar", "Panel", "draw_bars"]

FAR = 12.0  # times the smallest figure, from which a linear axis would hide it


@dataclasses.dataclass(frozen=True)
class Bar:
    """A figure with its quartiles. kind: "ours", "other", "bar" for something else of equal cost, or "floor" for what
    nothing can go below."""

    name: str
    value: float
    low: float
    high: float
    kind: str = "other"


@dataclasses.dataclass(frozen=True)
class Panel:
    """Bars of one unit, shown in their order."""

    title: str
    unit: str
    bars: Sequence[Bar]


def draw_bars(content: Sequence[Panel], title: str, columns: int = 2) -> SeveralForms:
    """{"svg": ..., "png": ...}: horizontal bars with their figures; where they are far apart, on a logarithmic axis."""
    theme = light()
    colour = {"ours": theme["s0"], "floor": theme["s2"], "bar": theme["s4"], "other": theme["s6"]}
    columns = min(columns, len(content))
    rows = [content[i : i + columns] for i in range(0, len(content), columns)]
    heights = [0.75 + 0.21 * max(len(p.bars) for p in row) for row in rows]
    with picture_file(6.2 * columns, sum(heights) + 0.35, title) as (figure, made):
        grid = panels(figure, len(content), columns, gridspec_kw={"height_ratios": heights})
        for axes, panel in zip(grid, content):
            _panel(axes, panel, colour, theme["ink"])
    return made


def _panel(axes: Any, panel: Panel, colour: dict[str, str], ink: str) -> None:
    places = range(len(panel.bars))
    values = [b.value for b in panel.bars]
    low, high = min(b.low for b in panel.bars), max(b.high for b in panel.bars)
    far = low > 0 and high > FAR * low
    left = low / 1.6 if far else min(0.0, 1.12 * low)
    axes.set_xscale("log" if far else "linear")
    axes.barh(places, [v - left for v in values], left=left, height=0.68, color=[colour[b.kind] for b in panel.bars])
    reach = [[b.value - b.low for b in panel.bars], [b.high - b.value for b in panel.bars]]
    axes.errorbar(values, places, xerr=reach, fmt="none", ecolor=ink, elinewidth=0.9, capsize=2)
    for place, b in zip(places, panel.bars):
        text = f"{b.value:.0f}" if b.value >= 99.95 else f"{b.value:.3g}"
        axes.annotate(text, (b.high, place), (4, 0), textcoords="offset points", va="center", fontsize=7.5, color=ink)
    axes.set_yticks(places, [clip(b.name, 36) for b in panel.bars])
    axes.set_xlim(left, high * (high / left) ** 0.12 if far else max(1.12 * high, 0.0) or left + 1.0)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", which="both", length=2)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    if far:
        axes.xaxis.set_minor_formatter(lambda v, _: "")
    title = clip(panel.title, 80)
    axes.set_title(title, fontsize=9 if len(title) < 48 else 7.5)
    axes.set_xlabel(panel.unit)
