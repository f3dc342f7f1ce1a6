"""What a record says, as tables of text: the terminal and the page of all systems each show them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["Table", "about", "tables"]


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns and rows of text; the first `left` columns are words."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    left: int = 1


def about(record: Mapping[str, Any]) -> str:
    """One line: seeds, minutes, learning rates, versions, machine."""
    made, minutes = record["made_with"], record["minutes"]
    seeds = ", ".join(map(str, record["seeds"])) or "none complete"
    return (
        f"{record['when']}; seeds {seeds}; {minutes['total']:.1f} minutes, the slowest seed "
        f"{minutes['slowest_seed']:.1f}; moestro {made['moestro']}, torch {made['torch']}, Python {made['python']}; "
        f"{made['processor']}, {made['threads']} threads"
    )


def tables(record: Mapping[str, Any]) -> list[Table]:
    """Arms, claims, and where there are any: figures of the paper beside ours, and what was counted."""
    found = [_arms(record), _claims(record)]
    summary = record["summary"]
    if summary["published"]:
        rows = tuple(
            (
                p["what"],
                _unit(p["published"], p["unit"]),
                _unit(p["ours"], p["unit"]) if p["ours"] is not None else "–",
                p["why"],
            )
            for p in summary["published"]
        )
        found.append(Table("The paper's figures beside ours", ("figure", "paper", "ours", "not shown because"), rows))
    if summary["counted"]:
        rows = tuple(
            (
                c["what"],
                "–" if c["published"] is None else _unit(c["published"], c["unit"]),
                _unit(c["ours"], c["unit"]),
            )
            for c in summary["counted"]
        )
        found.append(Table("Counted, not trained", ("quantity", "paper", "ours"), rows))
    return found


def _arms(record: Mapping[str, Any]) -> Table:
    summary, settings = record["summary"], record["settings"]
    figures = [f for f in summary["figures"] if any(f in arm for arm in summary["arms"].values())]
    rows = []
    for name, arm in settings["arms"].items():
        runs = record["runs"].get(name, {})
        rates = sorted({run["lr"] for run in runs.values()})
        values = summary["arms"].get(name, {})
        rows.append(
            (
                name + (" *" if name == settings["system"] else ""),
                arm["about"],
                str(arm["updates"]),
                f"{arm['flops']:.2f}",
                ", ".join(f"{lr:g}" for lr in rates) or "–",
                *(_spread(values.get(f)) for f in figures),
            )
        )
    described = "; ".join(f"{f}: {summary['figures'][f]}" for f in figures)
    note = (
        "* the system. FLOPs: of the whole training, against the system's. Mean ± standard deviation over seeds, on "
        f"test data; learning rates from {', '.join(f'{lr:g}' for lr in settings['grid'])}, chosen on validation data. "
        f"{described}"
    )
    columns = ("arm", "what it is", "updates", "FLOPs", "learning rate", *figures)
    return Table("Arms", columns, tuple(rows), note.strip(), left=2)


def _claims(record: Mapping[str, Any]) -> Table:
    rows = []
    for claim in record["summary"]["claims"]:
        values = claim.get("values", [])
        rows.append(
            (
                claim["text"] + ("" if claim["main"] else " (aside)"),
                claim["rule"],
                " ".join(f"{v:+.4g}" for v in values) or "–",
                f"{claim['mean']:+.4g} ± {claim['spread']:.2g}" if values else "–",
                claim["verdict"],
            )
        )
    note = (
        "holds: as predicted in every seed and the mean at its threshold; fails: the mean on the other side by more "
        "than one standard deviation; else within noise; undecided below three seeds and in smoke runs."
    )
    return Table("Claims", ("claim", "rule", "per seed", "mean", "verdict"), tuple(rows), note, left=2)


def _spread(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "–"
    return f"{figure['mean']:.4g}" + (f" ± {figure['spread']:.2g}" if len(figure["values"]) > 1 else "")


def _unit(value: Any, unit: str) -> str:
    text = f"{value:,.7g}" if isinstance(value, int | float) and abs(value) >= 1000 else value
    text = f"{text:.4g}" if isinstance(text, int | float) else str(text)
    return f"{text} {unit}".strip()
