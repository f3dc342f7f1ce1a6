"""The table at the end: a model and its dense twin, at equal steps and at equal training time.

The two arms are trained in turns, from evaluation to evaluation, so that a machine that slows down slows both. Training
time counts steps only, not evaluations, saves or the other arm's turns. "At equal time" is read off the same two runs:
each arm's validation curve, linear between its evaluations, at the time when the first of the two was done. The slower
arm's learning rate has then not yet come down; no second run is made to flatter either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .log import read_rows

__all__ = ["Line", "at_time", "curve", "table"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One arm in the table. Bits per byte on held-out text; where targets are no text, nats per target (nats,
    best_nats, nats_at_time) and the task's metrics in their place. None where not evaluated (yet).

    bits_per_byte: after step `evaluated`, the last after which all arms were. best_bits_per_byte: the lowest, at
    best_step. bits_per_byte_at_time: after `time` seconds of training. seconds: training time of all steps.
    """

    name: str
    steps: int
    params: int
    active_params: int
    flops_per_token: int
    evaluated: int | None
    bits_per_byte: float | None
    best_bits_per_byte: float | None
    best_step: int | None
    time: float | None
    bits_per_byte_at_time: float | None
    seconds: float
    tokens_per_second: float | None
    load_entropy: float | None
    nats: float | None = None
    best_nats: float | None = None
    nats_at_time: float | None = None
    metrics: Mapping[str, float] | None = None

    @property
    def measure(self) -> Literal["bits_per_byte", "nats"]:
        """What it was judged by."""
        return "bits_per_byte" if self.metrics is None else "nats"

    def to_dict(self) -> dict[str, Any]:
        """The fields of its measure, and all others."""
        bits, nats = (tuple(form.format(m) for form in _FORMS) for m in ("bits_per_byte", "nats"))
        unused = (*nats, "metrics") if self.metrics is None else bits
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unused}


_FORMS = ("{}", "best_{}", "{}_at_time")


def curve(metrics: Path) -> list[dict[str, Any]]:
    """The evaluations of a run, in order."""
    return list(read_rows(metrics, "eval"))


def at_time(evaluations: Sequence[dict[str, Any]], seconds: float, name: str = "bits_per_byte") -> float | None:
    """What rows call `name` after so many seconds of training, linear between evaluations; None outside of them."""
    before: dict[str, Any] | None = None
    for row in evaluations:
        if row["seconds"] >= seconds:
            if row["seconds"] == seconds:
                return row[name]
            if before is None:
                return None
            share = (seconds - before["seconds"]) / (row["seconds"] - before["seconds"])
            return before[name] + share * (row[name] - before[name])
        before = row
    return None


def table(arms: Sequence[tuple[dict[str, Any], Path]]) -> list[Line]:
    """One line per arm: (name, steps, params, active_params, flops_per_token, seconds, tokens) and its metrics."""
    curves = [curve(path) for _, path in arms]
    common = set.intersection(*({r["step"] for r in rows} for rows in curves)) if curves else set()
    last = max(common, default=None)
    ends = [rows[-1]["seconds"] if rows else None for rows in curves]
    time = None if None in ends or not ends else min(e for e in ends if e is not None)
    lines: list[Line] = []
    for (about, _), rows in zip(arms, curves):
        final = next((r for r in rows if r["step"] == last), None)
        name = "nats" if any("metrics" in r for r in rows) else "bits_per_byte"
        best = min(rows, key=lambda r: r[name], default=None)
        at = None if time is None else at_time(rows, time, name)
        found = (final[name] if final else None, best[name] if best else None, at)
        missing = dict.fromkeys(form.format("bits_per_byte") for form in _FORMS)
        judged: dict[str, Any] = missing | {form.format(name): value for form, value in zip(_FORMS, found)}
        if name == "nats":
            judged["metrics"] = final["metrics"] if final else {}
        lines.append(
            Line(
                name=about["name"],
                steps=about["steps"],
                params=about["params"],
                active_params=about["active_params"],
                flops_per_token=about["flops_per_token"],
                evaluated=last,
                best_step=best["step"] if best else None,
                time=time,
                seconds=about["seconds"],
                tokens_per_second=about["tokens"] / about["seconds"] if about["seconds"] else None,
                load_entropy=final["load_entropy"] if final else None,
                **judged,
            )
        )
    return lines
