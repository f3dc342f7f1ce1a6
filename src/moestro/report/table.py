"""The table that compares models at the end of a run, as plain values: the terminal and the page each show it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

__all__ = ["Line", "Table", "human"]


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


def human(value: float) -> str:
    """1234567 -> "1.235 M"; four digits."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g}"
