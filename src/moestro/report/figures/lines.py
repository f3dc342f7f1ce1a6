"""Curves of several models on one axis, as files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from .draw import clip
from .file import SeveralForms, light, picture_file

__all__ = ["Curve", "draw_curves"]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points (x, y) of one model, in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


def draw_curves(
    curves: Sequence[Curve], title: str, x: str, y: str, level: tuple[str, float] | None = None
) -> SeveralForms:
    """{"svg": ..., "png": ...}: the curves with a dot per point. x, y: what the axes show, with units.

    From the eighth curve on, colours come again with dotted lines. level: a name and a value that all of them start
    from, drawn as a dashed line.
    """
    theme = light()
    with picture_file(6.2, 3.7, title) as (figure, made):
        axes = figure.subplots()
        for i, curve in enumerate(curves):
            across, up = np.array(curve.points, dtype=float).T
            form = "o-" if i // 7 % 2 == 0 else "s:"
            axes.plot(across, up, form, color=theme[f"s{i % 7}"], markersize=3.2, label=clip(curve.name, 36))
        if level is not None:
            axes.axhline(level[1], color=theme["muted"], linewidth=1.0, linestyle="--", label=clip(level[0], 36))
        axes.set_xlim(left=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(loc="upper right")
    return made
