"""Pictures of load: each expert's share over time and at the end, imbalance, and routing entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...trace.metrics import load_entropy, load_share, max_violation
from ...trace.tables import Trace
from .draw import (
    INK,
    MOST_PANELS,
    MUTED,
    Picture,
    canvas,
    colour_bar,
    depth_colour,
    heatmap,
    panels,
    series_colour,
    short,
    svg,
    thin,
)

__all__ = ["entropy_over_time", "imbalance_over_time", "load_at_end", "load_over_time"]

_BINS = 120  # columns of a picture over time
_TAIL = 0.1  # "the end" is the last tenth of training


def load_over_time(trace: Trace, name: str = "load") -> Picture | None:
    """Load of every expert relative to an equal share, one panel per layer, steps to the right; None without counts."""
    if len(trace.counts) < 2 or not trace.layers:
        return None
    counts, chosen = trace.counts, thin(list(enumerate(trace.layers)), MOST_PANELS)
    edges = np.unique(np.linspace(0, len(counts), min(_BINS, len(counts)) + 1).round().astype(int))
    relative = []
    for number, layer in chosen:
        sums = np.add.reduceat(trace.load(number), edges[:-1], axis=0)
        relative.append(load_share(sums) * layer.num_experts)
    top = float(np.clip(np.nanmax([np.nanmax(r, initial=1.0) for r in relative]), 2.0, 4.0))
    L, experts = len(chosen), max(layer.num_experts for _, layer in chosen)
    columns = 2 if L > 1 else 1
    lines = -(-L // columns)
    panel = 0.45 + np.clip(0.13 * experts, 0.9, 2.4)
    title = "Load of every expert over time"
    with canvas(9.4, lines * panel + 0.75) as figure:
        grid = panels(figure, L, columns, sharex=True)
        image = None
        for axes, (_, layer), values in zip(grid, chosen, relative):
            E = layer.num_experts
            span = (float(counts.first[0]), float(counts.last[-1]) + 1, E - 0.5, -0.5)
            image = heatmap(axes, values.T, 0.0, top, span)
            axes.set_title(short(layer.path))
            _expert_ticks(axes.set_yticks, E)
        for axes in grid[-columns:]:
            axes.set_xlabel("training step")
            axes.tick_params(labelbottom=True)
        for axes in grid[::columns]:
            axes.set_ylabel("expert")
        colour_bar(figure, image, grid, "load / equal share", fraction=0.025, open_end=top == 4.0)
        drawn = svg(figure, title, name + "-")
    kept = thin(range(len(edges) - 1), max(4, min(24, 6000 // (L * experts))))
    rows = [
        (layer.path, e, *(float(values[i, e]) for i in kept))
        for (_, layer), values in zip(chosen, relative)
        for e in range(layer.num_experts)
    ]
    steps = [f"steps {counts.first[edges[i]]}–{counts.last[edges[i + 1] - 1]}" for i in kept]
    return Picture(
        title=title,
        caption="Rows that each expert received, divided by what an equal share would be: 1 = as many as the average "
        "expert of its layer, 0 = none. After capacity; padding not counted." + _selection(trace),
        svg=drawn,
        width=940,
        columns=("layer", "expert", *steps),
        rows=rows,
    )


def load_at_end(trace: Trace, name: str = "end") -> Picture | None:
    """Each expert's share of its layer's rows over the last tenth of the trace, as bars; None without counts."""
    if not len(trace.counts) or not trace.layers:
        return None
    start, stop = _tail(trace)
    rows: list[tuple[Any, ...]] = []
    chosen = thin(list(enumerate(trace.layers)), MOST_PANELS)
    columns = min(4, len(chosen))
    title = "Share of each expert" if len(trace.counts) == 1 else "Share of each expert at the end"
    with canvas(9.4, 1.75 * -(-len(chosen) // columns) + 0.25) as figure:
        grid = panels(figure, len(chosen), columns, sharey=True)
        for axes, (number, layer) in zip(grid, chosen):
            share = np.nan_to_num(load_share(trace.load(number)[start:stop].sum(0)))
            axes.bar(np.arange(layer.num_experts), 100 * share, color=series_colour(0), width=0.78)
            axes.axhline(100 / layer.num_experts, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
            axes.set_title(short(layer.path))
            axes.grid(False, axis="x")
            axes.spines["left"].set_visible(False)
            axes.tick_params(length=0)
            _expert_ticks(axes.set_xticks, layer.num_experts, 8)
            axes.set_xlabel("expert")
            rows += [(layer.path, e, 100 * float(v)) for e, v in enumerate(share)]
        for axes in grid[::columns]:
            axes.set_ylabel("% of rows")
        drawn = svg(figure, title, name + "-")
    steps = f"{int(trace.counts.first[start])}–{int(trace.counts.last[stop - 1])}"
    return Picture(
        title=title,
        caption=f"Share of its layer's rows that each expert received in steps {steps}. Dashed: the equal share."
        + _selection(trace),
        svg=drawn,
        width=940,
        columns=("layer", "expert", "share of rows (%)"),
        rows=rows,
    )


def imbalance_over_time(trace: Trace, name: str = "imbalance") -> Picture | None:
    """Maximal violation (max - mean) / mean of the loads, one line per layer; None without counts."""
    values = [max_violation(trace.load(n)) for n in range(len(trace.layers))]
    return _lines(
        trace,
        values,
        name,
        title="Imbalance over time",
        caption="How far the fullest expert of each layer is above the average one: (max − mean) / mean. 0 = equal "
        "load, number of experts − 1 = one expert takes all.",
        label="maximal violation",
        reference=None,
        extra=("load entropy (1 = equal)", [load_entropy(trace.load(n)) for n in range(len(trace.layers))]),
    )


def entropy_over_time(trace: Trace, metrics: Sequence[Mapping[str, Any]] = (), name: str = "entropy") -> Picture | None:
    """Mean routing entropy in nats, one line per layer; None where it was not recorded.

    From the trace, where training measured it (a `RoutingEntropy` among the losses), else from evaluations: rows of
    `metrics` with a field routing_entropy, path -> nats.
    """
    mean = trace.counts.mean_entropy()
    if not np.isfinite(mean).any():
        mean = _evaluated_entropy(trace, metrics)
    flat = [np.log(layer.num_experts + len(layer.virtual)) for layer in trace.layers]
    return _lines(
        trace,
        [mean[:, n] for n in range(len(trace.layers))],
        name,
        title="Routing entropy over time",
        caption="How undecided the routers are: mean over tokens of the entropy of the router's distribution. "
        "0 = always certain; dashed: flat, every expert equally likely.",
        label="entropy (nats)",
        reference=max(flat, default=None),
    )


def _evaluated_entropy(trace: Trace, metrics: Sequence[Mapping[str, Any]]) -> Any:
    """[steps, layers], NaN but at the steps of evaluations."""
    mean = np.full((len(trace.counts), len(trace.layers)), np.nan)
    for row in metrics:
        found = row.get("routing_entropy")
        if isinstance(found, Mapping) and len(mean):
            at = int(np.searchsorted(trace.counts.last, row["step"]).clip(0, len(mean) - 1))
            for n, layer in enumerate(trace.layers):
                if found.get(layer.path) is not None:
                    mean[at, n] = found[layer.path]
    return mean


def _lines(
    trace: Trace,
    values: list[Any],
    name: str,
    *,
    title: str,
    caption: str,
    label: str,
    reference: float | None,
    extra: tuple[str, list[Any]] | None = None,
) -> Picture | None:
    known = [n for n, v in enumerate(values) if np.isfinite(v).any()]
    if not known or len(trace.counts) < 2:
        return None
    middle = (trace.counts.first + trace.counts.last) / 2
    with canvas(5.1, 3.0) as figure:
        axes = figure.subplots()
        for n in known:
            x, y = _binned(middle, values[n])
            path = short(trace.layers[n].path)
            marker = {"marker": "o", "markersize": 3.2} if len(x) < 60 else {}
            axes.plot(x, y, color=depth_colour(n, len(values)), linewidth=1.5, label=path, **marker)
        if reference is not None:
            axes.axhline(reference, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)))
        axes.set_xlabel("training step")
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        if len(known) <= 8:
            axes.legend(ncols=2 if len(known) > 4 else 1)
        drawn = svg(figure, title, name + "-")
    if len(known) > 8:
        caption += " From violet and blue (first layers) to green and yellow (last ones)."
    picked = thin([i for i in range(len(trace.counts)) if any(np.isfinite(values[n][i]) for n in known)], 60)
    rows = []
    for n in known:
        for i in [i for i in picked if np.isfinite(values[n][i])]:
            row = (trace.layers[n].path, int(trace.counts.first[i]), int(trace.counts.last[i]), float(values[n][i]))
            rows.append(row if extra is None else (*row, float(extra[1][n][i])))
    columns = ("layer", "first step", "last step", label)
    return Picture(
        title=title,
        caption=caption,
        svg=drawn,
        width=510,
        columns=columns if extra is None else (*columns, extra[0]),
        rows=rows,
    )


def _selection(trace: Trace) -> str:
    """What to add to a caption where not every layer is shown."""
    return f" Shown: {MOST_PANELS} of {len(trace.layers)} layers." if len(trace.layers) > MOST_PANELS else ""


def _binned(x: Any, y: Any) -> tuple[Any, Any]:
    """Means over neighbouring points, at most 200 of them; NaN left out."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) <= 200:
        return x, y
    edges = np.linspace(0, len(x), 201).round().astype(int)
    number = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / number, np.add.reduceat(y, edges[:-1]) / number


def _tail(trace: Trace) -> tuple[int, int]:
    """The rows [start, stop) of counts that are the last tenth of training."""
    counts = trace.counts
    begin = counts.last[-1] - _TAIL * (counts.last[-1] - counts.first[0] + 1)
    return int(np.searchsorted(counts.last, begin, side="right").clip(0, len(counts) - 1)), len(counts)


def _expert_ticks(place: Any, experts: int, most: int = 16) -> None:
    step = max(1, int(np.ceil(experts / most)))
    place(range(0, experts, step))
