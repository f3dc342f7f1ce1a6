"""The table that compares models at the end of a run, as plain values: the terminal, JSON and the page each show it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

__all__ = ["Line", "ModelResult", "Table", "at", "comparison", "human"]

Metrics = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One trained model. rows: its metrics rows. params, active_params: counts. flops_per_token: forward FLOPs."""

    name: str
    rows: Metrics
    params: int | None = None
    active_params: int | None = None
    flops_per_token: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One compared quantity. values: one per model, None where it does not apply. digits: decimals; None = human()."""

    quantity: str
    values: tuple[float | None, ...]
    unit: str = ""
    better: Literal["lower", "higher", ""] = ""
    digits: int | None = 4

    def shown(self) -> tuple[str, ...]:
        """The values as text."""
        return tuple(self._show(value) for value in self.values)

    def difference(self) -> str:
        """First minus second model, signed, as text; a ratio where the quantity is shown by `human`."""
        if len(self.values) != 2 or None in self.values:
            return ""
        first, second = self.values
        assert first is not None
        assert second is not None
        if self.digits is not None:
            return f"{first - second:+.{self.digits}f}".replace("-", "−")
        return f"{first / second:.3f} ×" if second else ""

    def best(self) -> int | None:
        """Which model is better here, or None where that is no question or nobody is."""
        known = [v for v in self.values if v is not None and math.isfinite(v)]
        if not self.better or len(known) < 2 or len(set(known)) == 1:
            return None
        return self.values.index((min if self.better == "lower" else max)(known))

    def _show(self, value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return "–"
        return human(value) if self.digits is None else f"{value:.{self.digits}f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Lines over models. notes: what a reader must know to read it right."""

    title: str
    models: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: quantity -> {unit, model: value}."""
        return {
            line.quantity: {"unit": line.unit} | dict(zip(self.models, line.values, strict=True)) for line in self.lines
        }


def comparison(sparse: ModelResult, dense: ModelResult) -> Table:
    """The final table of a sparse model and its dense twin, as it came out.

    Values at equal steps and at equal wall time are read off the validation curves, in a straight line between two
    evaluations, at the last step and the last second that both models reached.
    """
    pair = (sparse, dense)
    notes: list[str] = []
    lines: list[Line] = []
    for against, unit, what in (("step", "", "equal steps"), ("seconds", " s", "equal wall time")):
        ends = [_last(model.rows, against) for model in pair]
        end = None if None in ends else min(e for e in ends if e is not None)
        values = tuple(None if end is None else at(model.rows, against, end) for model in pair)
        lines.append(Line(quantity=f"validation, {what}", values=values, unit="bits per byte", better="lower"))
        if end is not None:
            notes.append(f"{what}: {'step ' if against == 'step' else ''}{end:.0f}{unit}")
    lines += [
        Line(quantity="parameters", values=_of(pair, lambda m: m.params), digits=None),
        Line(quantity="active parameters", values=_of(pair, lambda m: m.active_params), digits=None),
        Line(
            quantity="compute", values=_of(pair, lambda m: m.flops_per_token), unit="forward FLOPs / token", digits=None
        ),
        Line(
            quantity="speed",
            values=_of(pair, lambda m: _median(m.rows, "tokens_per_s")),
            unit="training tokens / s",
            better="higher",
            digits=0,
        ),
        Line(
            quantity="load entropy",
            values=_of(pair, lambda m: _median(m.rows[-max(len(m.rows) // 10, 1) :], "load_entropy")),
            unit="1 = equal loads",
            digits=3,
        ),
    ]
    title = f"{sparse.name} and {dense.name}"
    return Table(title=title, models=(sparse.name, dense.name), lines=tuple(lines), notes=tuple(notes))


def at(rows: Metrics, against: str, where: float, split: str = "valid", what: str = "bpb") -> float | None:
    """The curve of `what` at `where` on the axis "step" or "seconds"; a straight line between rows, None outside."""
    points = _points(rows, against, split, what)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= where <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (where - x0) / (x1 - x0)
    return next((y for x, y in points if x == where), None)


def human(value: float) -> str:
    """1234567 -> "1.235 M"; four digits."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g}"


def _points(rows: Metrics, against: str, split: str, what: str) -> list[tuple[float, float]]:
    found = [
        (float(row[against]), float(row[what]))
        for row in rows
        if row.get("split") == split and row.get(against) is not None and row.get(what) is not None
    ]
    return sorted(p for p in found if math.isfinite(p[0]) and math.isfinite(p[1]))


def _last(rows: Metrics, against: str) -> float | None:
    points = _points(rows, against, "valid", "bpb")
    return points[-1][0] if points else None


def _median(rows: Metrics, name: str) -> float | None:
    found = [float(row[name]) for row in rows if row.get(name) is not None and row.get("split", "train") == "train"]
    found = [value for value in found if math.isfinite(value)]
    return statistics.median(found) if found else None


def _of(pair: tuple[ModelResult, ...], read: Callable[[ModelResult], float | None]) -> tuple[float | None, ...]:
    return tuple(read(model) for model in pair)
