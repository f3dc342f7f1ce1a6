"""Tables of a record, for terminals and for pages: everything in them is derived from the record. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..report.table import human
from .goals import METHOD, PLAIN
from .timing import spread

__all__ = ["Table", "about", "goals_table", "markdown", "notes", "regime_tables", "routing_table", "train_table"]

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, headers, rows of text, and lines on contenders that were not timed."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def regime_tables(record: Record, routings: Sequence[str] | None = None) -> list[Table]:
    """A table per kind of regime, shape and routing (of those in `routings`), numbers of tokens side by side; one table
    of a record of training or of routing methods."""
    if "tokens_per_step" in record:
        return [train_table(record)]
    if "methods" in record:
        return [routing_table(record)]
    groups: dict[str, list[tuple[str, Record]]] = {}
    for name, regime in record["regimes"].items():
        kind, routing = regime["kind"], regime.get("routing", "")
        if routings is not None and routing not in (*routings, "none", ""):
            continue
        sizes = " ".join(f"{letter} {regime[key]}" for letter, key in _SIZES if key in regime)
        if kind in ("cold decode", "whole model"):
            title, column = name, "ms per layer" if kind == "cold decode" else "ms per token"
        else:
            title = ", ".join(part for part in (kind, sizes, routing) if part not in ("", "none"))
            column = f"T {regime['tokens']}"
        groups.setdefault(title, []).append((column, regime))
    return [_table(title, columns) for title, columns in groups.items()]


_SIZES = (("D", "dim"), ("F", "width"), ("E", "experts"), ("K", "top_k"))


def _table(title: str, regimes: list[tuple[str, Record]]) -> Table:
    names = list(dict.fromkeys(name for _, regime in regimes for name in regime["rows"]))
    kind = regimes[0][1]["kind"]
    decoding = kind in ("cold decode", "whole model")
    heads = [column if decoding else f"{column}, ms" for column, _ in regimes]
    extra = {
        "cold decode": ("MB read", "relative error"),
        "whole model": ("tokens/s", "same tokens"),
        "router": ("differing choices",),
    }.get(kind, ("relative error", "peak memory"))
    rows = []
    for name in names:
        found = [regime["rows"].get(name, {}) for _, regime in regimes]
        rows.append((name, *(_time(row) for row in found), *_extra(kind, found)))
    return Table(title, ("", *heads, *extra), tuple(rows), notes(regimes))


def _time(row: Record) -> str:
    if "milliseconds" not in row:
        return "-"
    ms = row["milliseconds"]
    return f"{three(ms['median'])} ({three(ms['low'])} to {three(ms['high'])})"


def _extra(kind: str, found: Sequence[Record]) -> tuple[str, ...]:
    timed = [row for row in found if "milliseconds" in row]
    if kind == "whole model":
        row = found[0]
        speed = f"{1e3 / row['milliseconds']['median']:.1f}" if timed else "-"
        return speed, f"{row['agree']} of {row['of']}" if "agree" in row else "-"
    errors = [row["errors"] for row in found if "errors" in row]
    if kind == "router":
        return ("/".join(str(e["differing"]) for e in errors) or "-",)
    known = [value for e in errors for value in e.values() if value is not None]
    error = f"{max(known):.0e}" if known else "-"
    if kind == "cold decode":
        return (f"{found[0]['bytes'] / 1e6:.2f}" if "bytes" in found[0] else "-"), error
    peaks = [row["peak_bytes"] for row in timed if row.get("peak_bytes") is not None]
    return error, f"{three(max(peaks) / 2**20)} MiB" if peaks else "-"


def notes(regimes: Sequence[tuple[str, Record]]) -> tuple[str, ...]:
    """Who was not timed, and why; how long compilation took."""
    said: dict[str, list[str]] = {}
    compiled: dict[str, list[str]] = {}
    for column, regime in regimes:
        for name, row in regime["rows"].items():
            why = row.get("absent") or row.get("refused")
            if why:
                said.setdefault(f"{name}: not timed, {why}", []).append(column)
            if "compile_seconds" in row:
                compiled.setdefault(name, []).append(f"{row['compile_seconds']:.0f}")
    several = len(regimes) > 1
    lines = [f"{line} ({', '.join(columns)})" if several else line for line, columns in said.items()]
    return (*lines, *(f"{name}: compilation took {' + '.join(s)} s, not counted" for name, s in compiled.items()))


def train_table(record: Record) -> Table:
    """Speed of whole steps and the time of their parts."""
    rows, said = [], []
    for name, row in record["rows"].items():
        if "absent" in row:
            said.append(f"{name}: not timed, {row['absent']}")
        elif not row.get("agrees", True):
            said.append(f"{name}: not timed, its gradients differ ({row['where']}: {row['worst']})")
        if "tokens_per_second" not in row:
            rows.append((name, *["-"] * 7))
            continue
        speed = row["tokens_per_second"]
        named = [f"{part}_seconds" for part in ("step", "experts", "attention", "rest")]
        parts = (f"{1e3 * row[n]:.1f}" if n in row else "-" for n in named)
        same = f"{row['worst']:.0e}" if "worst" in row else ""
        speeds = (f"{speed['median']:.0f} ({speed['low']:.0f} to {speed['high']:.0f})", f"{speed['most']:.0f}")
        rows.append((name, *speeds, *parts, same))
    said.append(
        "experts: forward and backward of the feed-forward layers, router included, timed apart; attention likewise; "
        "rest: the remainder of the step"
    )
    columns = ("", "tokens/s", "fastest", "step ms", "experts ms", "attention ms", "rest ms", "gradients differ by")
    return Table(f"Training speed of {record['name']}, seed {record['seed']}", columns, tuple(rows), tuple(said))


def routing_table(record: Record) -> Table:
    """Steps of routing methods beside those of plain layers."""
    rows = []
    for name, regime in record["regimes"].items():
        method, plain = (regime["rows"][who] for who in (METHOD, PLAIN))
        apart = sorted(m / p for m, p in zip(method["seconds"], plain["seconds"]))
        r = spread(apart)
        flops = method["flops_per_token"] / plain["flops_per_token"]
        rows.append(
            (
                name,
                plain["what"],
                *(f"{row['milliseconds']['median']:.1f}" for row in (method, plain)),
                f"{r.median:.3f} ({r.low:.3f} to {r.high:.3f})",
                f"{method['experts_per_token']:.2f}",
                f"{flops:.3f}",
                f"{r.median / flops:.3f}",
            )
        )
    columns = ("", "plain layer", "step ms", "plain ms", "time of plain's", "experts/token", "FLOPs of plain's")
    said = ("plain layer: equal counted FLOPs of the whole model; per FLOP: the quotient of the two before it",)
    return Table(f"Steps of routing methods, seed {record['seed']}", (*columns, "per FLOP"), tuple(rows), said)


_RESULTS = ("changed output", "bits/byte", "against dense")


def upcycling_table(record: Record) -> Table:
    """The models of the demonstration of upcycling, trained on from one dense model."""
    dense = record["arms"]["dense"]["bits_per_byte"]
    rows = []
    for name, arm in record["arms"].items():
        receipt = arm.get("receipt")
        sizes = (human(arm["params"]), human(arm["active_params"]), str(arm["steps"]), human(arm["flops"]))
        change = "" if receipt is None else f"{receipt['relative']:.2g}"
        against = "" if receipt is None else f"{arm['bits_per_byte'] - dense:+.4f}"
        title = name + (" *" if name == record["best"] else "")
        rows.append((title, *sizes, change, f"{arm['bits_per_byte']:.4f}", against))
    return Table(
        title="Trained on from one dense model, at equal active FLOPs",
        columns=(
            "model",
            "parameters",
            "active",
            "steps",
            "FLOPs forward",
            "changed output",
            "bits/byte",
            "against dense",
        ),
        rows=tuple(rows),
        notes=(
            f"The dense model had {record['before']:.4f} bits per byte when it was converted.",
            "Changed output: relative difference that the conversion itself made to the logits, see receipt.json. "
            "* exported",
        ),
    )


def about(record: Record) -> str:
    """Where and how a record was made, in one paragraph."""
    if "arms" in record:
        machine, minutes = record["machine"], record["minutes"]
        return f"{_where(machine)}; {record['when']}; {minutes:.1f} minutes in all"
    machine, load, memory = record["machine"], record["load_average"], record["peak_memory"]
    before, after = (f"{load[when][0]:.1f}" if load[when] else "unknown" for when in ("before", "after"))
    peaks = ", ".join(f"of the {who} {size / 2**30:.1f} GiB" for who, size in memory.items())
    return (
        f"{_where(machine)}; kernels: {machine['kernels']}; {record['rounds']} rounds, {record['when']}; "
        f"load average {before} before, {after} after; peak memory {peaks}"
    )


def _where(machine: Record) -> str:
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "transformers"))
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['instruction_set']}, {machine.get('accelerator', machine['device'])}; {versions}"
    )


def goals_table(records: Iterable[Record]) -> Table:
    """Every goal that the records speak of, with what was measured beside it."""
    rows = []
    for record in records:
        for g in record["goals"]:
            wanted = f"at least {g['at_least']:g}" if g["at_least"] is not None else f"at most {g['at_most']:g}"
            what = "times as fast as" if g["at_least"] is not None else "times the time of"
            if g["measured"] is None:
                rows.append((g["regime"], g["ours"], f"{what} {g['peer']}", wanted, "-", "-", g["why"]))
                continue
            measured = f"{g['measured']:.2f} ({g['low']:.2f} to {g['high']:.2f})"
            holds = "holds" if g["holds"] else "does not hold"
            rows.append((g["regime"], g["ours"], f"{what} {g['peer']}", wanted, measured, f"{g['fastest']:.2f}", holds))
    columns = ("regime", "", "compared with", "goal", "median of rounds (quartiles)", "fastest", "")
    return Table("Goals", columns, tuple(rows))


def markdown(table: Table) -> str:
    """The table as Markdown, with its title as a line above and its notes as a list below."""
    left = 3 if table.columns[-1] == "" else 1
    lines = [
        f"**{table.title}**",
        "",
        "| " + " | ".join(table.columns) + " |",
        "|" + "|".join("---" if i < left else "--:" for i in range(len(table.columns))) + "|",
        *("| " + " | ".join(row) + " |" for row in table.rows),
    ]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def three(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 123, 1234."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
