"""Curves of training: bits per byte, or nats, against steps and against the seconds spent on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .draw import Picture, canvas, clip, series_colour, svg, thin

__all__ = ["bits_per_byte", "runs_of"]

_AXES = {"step": "training step", "seconds": "training time (s)"}


def runs_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Metrics rows by run: the field `run` where there is one, and `model` ("sparse", "dense")."""
    out: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = " ".join(str(row[key]) for key in ("run", "model") if row.get(key)) or "model"
        out.setdefault(name, []).append(row)
    return out


def bits_per_byte(rows: Sequence[Mapping[str, Any]], against: str = "step", name: str = "bpb") -> Picture | None:
    """Training (thin) and validation (thick, dotted) bits per byte against "step" or "seconds"; None without data.
    Rows without bits per byte (`bpb`) anywhere: nats per target (`nats`)."""
    field = "bpb" if any(_number(row.get("bpb")) for row in rows) else "nats"
    unit = {"bpb": "bits per byte", "nats": "nats per target"}[field]
    curves: list[tuple[str, str, list[tuple[float, float]]]] = []
    for run, group in runs_of(rows).items():
        for split in ("train", "valid"):
            points = [
                (float(row[against]), float(row[field]))
                for row in group
                if row.get("split") == split and _number(row.get(against)) and _number(row.get(field))
            ]
            if points:
                curves.append((run, split, points))
    if not curves:
        return None
    colours = {run: series_colour(i) for i, run in enumerate(dict.fromkeys(run for run, _, _ in curves))}
    title = f"{unit.capitalize()} against {'steps' if against == 'step' else 'training time'}"
    with canvas(5.1, 3.1) as figure:
        axes = figure.subplots()
        for run, split, points in curves:
            x, y = np.array(points).T
            if split == "train":
                axes.plot(x, y, color=colours[run], alpha=0.22, linewidth=0.8)
                y = _smooth(y)
                axes.plot(x, y, color=colours[run], alpha=0.75, linewidth=1.1, label=f"{clip(run)}, training")
            else:
                size = 3.2 if len(x) < 60 else 0
                axes.plot(x, y, color=colours[run], marker="o", markersize=size, label=f"{clip(run)}, validation")
        _limits(axes, [y for _, _, points in curves for _, y in points])
        axes.set_xlabel(_AXES[against])
        axes.set_ylabel(unit)
        axes.set_xlim(left=0)
        axes.legend(ncols=1, loc="upper right")
        drawn = svg(figure, title, name + "-")
    table = [(run, split, *point) for run, split, points in curves for point in thin(points, 200)]
    return Picture(
        title=title,
        caption="Thick, with dots: validation on held-out "
        f"{'text, all models on the same bytes' if field == 'bpb' else 'examples, the same for all models'}. "
        "Thin: training batches, "
        "pale as measured and darker as a running mean. The vertical axis leaves out the first steps. Lower is better.",
        svg=drawn,
        width=510,
        columns=("run", "split", _AXES[against], unit),
        rows=table,
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _smooth(y: Any) -> Any:
    """A centred running mean over about a fortieth of the curve, shrinking at both ends."""
    half = len(y) // 80
    if half < 1:
        return y
    sums = np.concatenate([[0.0], np.cumsum(y)])
    i = np.arange(len(y))
    reach = np.minimum(half, np.minimum(i, len(y) - 1 - i))
    return (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)


def _limits(axes: Any, values: Sequence[float]) -> None:
    """Look at the curve, not at its first seconds: the top is well above what nine in ten points reach."""
    low, high = float(np.min(values)), float(np.quantile(values, 0.93))
    if high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.35 * (high - low))
