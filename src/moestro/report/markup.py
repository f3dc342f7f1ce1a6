"""HTML from plain values. Every text goes through `text`; nothing else writes into the page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .figures.draw import Picture, plain
from .table import Table

__all__ = ["comparison", "data_table", "figure", "settings", "text", "token_chip", "visible"]

_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def text(value: object) -> str:
    """Any text as HTML text that cannot be anything else."""
    return html.escape(plain(value), quote=True)


def number(value: Any) -> str:
    """A cell of a data table: four significant digits, a dash for what is not known."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}" if math.isfinite(value) else "–"


def data_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], label: str) -> str:
    """A folded table with the numbers behind a picture."""
    head = "".join(f'<th scope="col">{text(c)}</th>' for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{number(v)}</td>" for v in row) + "</tr>" for row in rows)
    return (
        f"<details><summary>{text(label)}</summary><div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div></details>"
    )


def figure(picture: Picture) -> str:
    """A picture with title, caption and data."""
    wide = ' class="wide"' if picture.width > 600 else ""
    return (
        f'<figure style="max-width: {picture.width}px"><h3>{text(picture.title)}</h3><div{wide}>{picture.svg}</div>'
        f"<figcaption>{text(picture.caption)}</figcaption>{data_table(picture.columns, picture.rows, 'Data')}</figure>"
    )


def comparison(table: Table) -> str:
    """The final table, the better of two values marked."""
    two = len(table.models) == 2
    head = "".join(f'<th scope="col">{text(c)}</th>' for c in ("", *table.models, *(("difference",) if two else ())))
    body = []
    for line in table.lines:
        unit = f' <span class="unit">{text(line.unit)}</span>' if line.unit else ""
        best = line.best()
        cells = "".join(
            f'<td class="best">{text(v)}</td>' if i == best else f"<td>{text(v)}</td>"
            for i, v in enumerate(line.shown())
        )
        last = f'<td class="muted">{text(line.difference())}</td>' if two else ""
        body.append(f"<tr><td>{text(line.quantity)}{unit}</td>{cells}{last}</tr>")
    notes = f'<p class="muted">{text("; ".join(table.notes))}.</p>' if table.notes else ""
    return (
        f'<div class="scroll compare" style="max-height: none"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{notes}"
    )


def settings(values: Mapping[str, Any], label: str, *, opened: bool = False) -> str:
    """Nested settings as a folded list of dotted names."""
    rows = "".join(f"<tr><td>{text(name)}</td><td>{text(value)}</td></tr>" for name, value in _flat(values))
    state = " open" if opened else ""
    return (
        f"<details{state}><summary>{text(label)}</summary><div class='scroll settings'><table><tbody>{rows}</tbody>"
        "</table></div></details>"
    )


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(values, list | tuple) and any(isinstance(v, Mapping) for v in values):
        for i, value in enumerate(values):
            yield from _flat(value, f"{prefix}[{i}]")
    else:
        yield prefix, str(values)


def visible(piece: str) -> str:
    """A token's text with its white space made visible, cut at 24 characters."""
    shown = "".join(_VISIBLE.get(c, c) for c in piece)
    return shown if len(shown) <= 24 else shown[:23] + "…"


def token_chip(piece: str, count: int, lift: float) -> str:
    """A token with how many times more often than average it comes to the expert."""
    times = f"{lift:.1f}×" if lift < 10 else f"{lift:.0f}×"
    return f'<span class="chip" title="{count} choices"><bdi>{text(visible(piece))}</bdi><small>{times}</small></span>'
