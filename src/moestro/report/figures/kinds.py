"""Pictures of what experts take: kinds of characters and tokens, co-activation, and how early the routing settled."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ...core.errors import UserError
from ...trace.metrics import coactivation_share, label_counts, label_information, label_share, saturation, token_counts
from ...trace.tables import Layer, Sample, Trace
from .draw import MOST_PANELS, Picture, canvas, clip, colour_bar, depth_colour, heatmap, panels, short, svg, thin

__all__ = ["Characteristic", "characteristic_tokens", "coactivation_map", "kinds_map", "saturation_curve"]

_NOUNS = {"python": "Python token"}  # what a kind of label is called in a sentence, where its name does not do
Characteristic = tuple[str, int, list[tuple[int, int, float]]]


def kinds_map(trace: Trace, sample: Sample, kind: str, name: str = "kinds") -> Picture | None:
    """Share of every label's choices that each expert takes, one panel per layer; None without such labels."""
    labels, names = sample.columns.get(f"label.{kind}"), trace.labels.get(kind)
    if labels is None or not names:
        return None
    tables = [(layer, sample.table(number)) for number, layer in enumerate(trace.layers)]
    known = [(layer, table) for layer, table in tables if table is not None and table.units == len(labels)]
    if not known:
        return None
    known = thin(known, MOST_PANELS)
    counts = [label_counts(table, labels, len(names), layer.num_experts) for layer, table in known]
    seen = np.flatnonzero(sum(c.sum(1) for c in counts))
    if not len(seen):
        return None
    shares = [label_share(c)[seen] for c in counts]
    top = max(float(np.nanmax(s)) for s in shares)
    L, E = len(known), max(layer.num_experts for layer, _ in known)
    columns = 2 if L > 1 and E <= 16 else 1
    noun = _NOUNS.get(kind, kind)
    title = f"Which kinds of {noun} each expert takes"
    with canvas(9.4, -(-L // columns) * (0.4 + 0.2 * len(seen)) + 0.6) as figure:
        grid = panels(figure, L, columns, sharey=True)
        image = None
        for axes, (layer, _), share, count in zip(grid, known, shares, counts):
            image = heatmap(axes, 100 * share, 0.0, 100 * top)
            information = label_information(count)[1]
            axes.set_title(short(layer.path) + f" · information {100 * information:.0f} %")
            axes.set_yticks(range(len(seen)), [clip(names[i]) for i in seen])
            axes.set_xticks(range(0, layer.num_experts, max(1, -(-layer.num_experts // 16))))
            if layer.num_experts <= 16:
                _numbers(axes, 100 * share, 60 * top)
        for axes in grid[-columns:]:
            axes.set_xlabel("expert")
        colour_bar(figure, image, grid, "% of the kind's choices", fraction=0.025)
        drawn = svg(figure, title, name + "-")
    rows = [
        (layer.path, names[i], int(count[i].sum()), *(100 * float(v) for v in share_row))
        for (layer, _), share, count in zip(known, shares, counts)
        for i, share_row in zip(seen, share)
    ]
    return Picture(
        title=title,
        caption=f"Of all choices made for one kind of {noun}, the percentage that fell on each expert (rows sum to "
        f"100); step {sample.step}, {len(labels)} tokens of {sample.name!r}. Information: how much knowing the expert "
        "tells of the kind, mutual information divided by the entropy of the kinds.",
        svg=drawn,
        width=940,
        columns=("layer", "kind", "choices", *(f"expert {e} (%)" for e in range(E))),
        rows=rows,
    )


def characteristic_tokens(trace: Trace, sample: Sample, most: int = 8) -> list[Characteristic]:
    """(layer path, expert, [(token id, its choices of this expert, lift)]) for every expert, most telling token first.

    lift = share of the token's choices that fall on the expert, over the expert's share of all choices. Tokens are
    ordered by choices * log(lift), their part in the divergence between the expert's tokens and all tokens.
    """
    tokens, out = sample.columns.get("token"), []
    if tokens is None:
        return out
    for number, layer in thin(list(enumerate(trace.layers)), MOST_PANELS):
        table = sample.table(number)
        if table is None or table.units != len(tokens):
            continue
        found = token_counts(table, tokens, layer.num_experts)
        ids, counts = np.array(list(found)), np.array(list(found.values()), np.float64)
        each, whole = counts.sum(1, keepdims=True), counts.sum(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            lift = (counts / each) / (whole / whole.sum())
            score = np.where(counts > 0, counts * np.log(lift), 0.0)
        for expert in range(layer.num_experts):
            best = [i for i in np.argsort(-score[:, expert], kind="stable")[:most] if score[i, expert] > 0]
            out.append(
                (layer.path, expert, [(int(ids[i]), int(counts[i, expert]), float(lift[i, expert])) for i in best])
            )
    return out


def coactivation_map(trace: Trace, sample: Sample, name: str = "together") -> Picture | None:
    """Which experts are chosen together, one panel per layer; None where units have one expert each."""
    known = []
    for number, layer in thin(list(enumerate(trace.layers)), MOST_PANELS):
        table = sample.table(number)
        if table is not None and table.type != "Dense" and layer.num_experts > 1:
            share = coactivation_share(table, layer.num_experts)
            if np.nansum(share) > 0:
                known.append((layer, share))
    if not known:
        return None
    top = max(float(np.nanmax(share)) for _, share in known)
    L = len(known)
    across = min(4, L)
    title = "Experts that are chosen together"
    with canvas(9.4, -(-L // across) * (9.4 / max(across, 3) * 0.86) + 0.3) as figure:
        grid = panels(figure, L, across)
        image = None
        for axes, (layer, share) in zip(grid, known):
            image = heatmap(axes, 100 * share, 0.0, 100 * top)
            axes.set_aspect("equal")
            axes.set_title(short(layer.path, 24))
            ticks = range(0, layer.num_experts, max(1, -(-layer.num_experts // 8)))
            axes.set_xticks(ticks)
            axes.set_yticks(ticks)
            axes.set_xlabel("also chose expert")
        for axes in grid[::across]:
            axes.set_ylabel("units of expert")
        colour_bar(figure, image, grid, "% of the units", fraction=0.02)
        drawn = svg(figure, title, name + "-")
    E = max(layer.num_experts for layer, _ in known)
    columns, rows = _matrices(known, E) if E <= 16 else _pairs(known)
    return Picture(
        title=title,
        caption="Of the tokens that chose the expert of the row, the percentage that also chose the expert of the "
        f"column; step {sample.step}, {sample.name!r}. Experts that are used independently give columns of one colour.",
        svg=drawn,
        width=940,
        columns=columns,
        rows=rows,
    )


def _matrices(known: list[tuple[Layer, Any]], experts: int) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the data table: the whole matrices."""
    rows = [
        [layer.path, i, *("–" if i == j else 100 * float(v) for j, v in enumerate(line))]
        for layer, share in known
        for i, line in enumerate(share)
    ]
    return ["layer", "expert", *(f"with {e} (%)" for e in range(experts))], rows


def _pairs(known: list[tuple[Layer, Any]], most: int = 40) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the data table where matrices are too large for one: the closest pairs of each layer."""
    rows: list[list[Any]] = []
    for layer, share in known:
        best = np.argsort(-np.nan_to_num(share, nan=-1.0), axis=None, kind="stable")[:most]
        rows += [[layer.path, int(f) // len(share), int(f) % len(share), 100 * float(share.flat[f])] for f in best]
    return ["layer", "expert", "with expert", f"% of the units ({most} closest pairs)"], rows


def saturation_curve(trace: Trace, name: str = "settled") -> Picture | None:
    """Share of the last sample's choices already made at earlier ones, for the same tokens; None without these."""
    groups = {n: [s for s in trace.samples if s.name == n] for n in dict.fromkeys(s.name for s in trace.samples)}
    series = max(groups.values(), key=len, default=[])
    if len(series) < 3:
        return None
    try:
        agree = [saturation(trace, sample, series[-1]) for sample in series[:-1]]
    except UserError:  # other tokens at other steps: nothing to compare
        return None
    paths = [layer.path for layer in trace.layers if all(layer.path in a for a in agree)]
    if not paths:
        return None
    title = "When the routing settled"
    steps = [s.step for s in series[:-1]]
    with canvas(5.1, 3.0) as figure:
        axes = figure.subplots()
        for i, path in enumerate(paths):
            y = [100 * a[path] for a in agree]
            axes.plot(steps, y, color=depth_colour(i, len(paths)), marker="o", markersize=3, label=short(path))
        axes.set_xlabel("training step")
        axes.set_ylabel("% of final choices")
        axes.set_ylim(0, 103)
        axes.set_xlim(left=0)
        if len(paths) <= 8:
            axes.legend(ncols=2 if len(paths) > 4 else 1, loc="lower right")
        drawn = svg(figure, title, name + "-")
    return Picture(
        title=title,
        caption=f"Router saturation: of the experts that the same tokens choose at step {series[-1].step}, the "
        "percentage that they chose already.",
        svg=drawn,
        width=510,
        columns=("layer", "step", "choices that agree (%)"),
        rows=[(path, step, 100 * a[path]) for path, (step, a) in itertools.product(paths, zip(steps, agree))],
    )


def _numbers(axes: Any, values: Any, bright: float) -> None:
    """The values of a heat map in its cells: light on dark colours, dark from `bright` on."""
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "#f4f4f4" if value < bright else "#141414"
            cell = axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=6.8, color=colour)
            cell.set_in_layout(False)
