"""The report: one self-contained HTML page from the metrics and the routing trace of a run."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core import files
from ..core.errors import UserError
from ..trace.metrics import dead_experts, dropped_share
from ..trace.tables import Sample, Trace
from . import markup
from .figures import curves, kinds, load
from .figures.draw import Picture
from .markup import text
from .style import CSS
from .table import Table

__all__ = ["Generated", "ReportData", "render", "write"]

# no script, no font, no picture from anywhere, whatever a corpus manages to put on the page
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """A text that a model wrote: what it was given, and what it added."""

    model: str
    prompt: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything on the page, as plain values; what is left out leaves its section out.

    metrics: rows of metrics.jsonl (of several runs, with a field `run` each). comparison: the final table.
    tiles: (label, value, note) shown large on top; from the comparison if not given. config, environment: settings
    and versions. command: how to make this run again. notes: sentences for the top of the page.
    patience: steps without a token after which an expert is named.
    """

    title: str = "A sparse language model"
    lead: str = ""
    metrics: Sequence[Mapping[str, Any]] = ()
    trace: Trace | None = None
    comparison: Table | None = None
    tiles: Sequence[tuple[str, str, str]] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    samples: Sequence[Generated] = ()
    command: str = ""
    notes: Sequence[str] = ()
    patience: int = 100


def write(path: str | os.PathLike[str], data: ReportData) -> None:
    """Write the page; the path holds the old file or the whole new one at any moment."""
    path = Path(path)
    content = render(data).encode()
    try:
        files.write(path, content)
    except OSError as error:
        raise UserError(f"cannot write the report {path}: {error.strerror or error}") from error


def render(data: ReportData) -> str:
    """The page as one string: no script, nothing fetched, every text escaped."""
    sections = [
        ("result", "Result", _result(data)),
        ("learning", "Learning", _learning(data)),
        ("load", "Load of the experts", _load(data)),
        ("taken", "What the experts take", _taken(data)),
        ("sample", "Generated text", _generated(data)),
        ("settings", "Settings", _settings(data)),
    ]
    sections = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<a href="#{name}">{text(title)}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{text(title)}</h2>{made}</section>' for name, title, made in sections)
    lead = f'<p class="lead">{text(data.lead)}</p>' if data.lead else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(data.title)}</title><style>{CSS}</style></head>\n<body><header><h1>{text(data.title)}</h1>"
        f"{lead}<nav>{links}</nav></header>\n<main>{body}</main>\n"
        f"<footer><p>{text(_origin(data))}</p></footer></body></html>\n"
    )


# Sections ---------------------------------------------------------------------------------------------------------


def _result(data: ReportData) -> str:
    tiles = data.tiles or _tiles(data.comparison)
    out = "".join(
        f'<div class="tile"><div class="label">{text(a)}</div><div class="value">{text(b)}</div>'
        f'<div class="note">{text(c)}</div></div>'
        for a, b, c in tiles
    )
    out = f'<div class="tiles">{out}</div>' if out else ""
    out += "".join(f"<p>{text(note)}</p>" for note in data.notes)
    return out + (markup.comparison(data.comparison) if data.comparison else "")


def _learning(data: ReportData) -> str:
    against = [
        curves.bits_per_byte(data.metrics, "step", "steps"),
        curves.bits_per_byte(data.metrics, "seconds", "time"),
    ]
    return _pair(against)


def _load(data: ReportData) -> str:
    trace = data.trace
    if trace is None:
        return ""
    lines = _pair([load.imbalance_over_time(trace), load.entropy_over_time(trace, data.metrics)])
    return (
        _silent(trace, data.patience)
        + _dropped(trace)
        + _all([load.load_over_time(trace), load.load_at_end(trace)])
        + lines
    )


def _taken(data: ReportData) -> str:
    trace = data.trace
    sample = None if trace is None else _richest(trace)
    if trace is None or sample is None:
        return ""
    pictures = [kinds.kinds_map(trace, sample, kind, f"kinds{i}") for i, kind in enumerate(_label_kinds(trace, sample))]
    rest = _all([kinds.coactivation_map(trace, sample), kinds.saturation_curve(trace)])
    return _all(pictures) + _characteristic(trace, sample) + rest


def _generated(data: ReportData) -> str:
    return "".join(
        f'<h3>{text(s.model)}</h3><pre dir="ltr"><span class="prompt">{text(s.prompt)}</span>{text(s.text)}</pre>'
        for s in data.samples
    )


def _settings(data: ReportData) -> str:
    out = f"<h3>To make this run again</h3><pre>{text(data.command)}</pre>" if data.command else ""
    if data.environment:
        out += markup.settings(data.environment, "Environment and versions", opened=True)
    if data.config:
        out += markup.settings(data.config, "All settings")
    if data.trace is not None and data.trace.data:
        out += markup.settings(data.trace.data, "Data")
    return out


# Pieces -----------------------------------------------------------------------------------------------------------


def _all(pictures: Sequence[Picture | None]) -> str:
    return "".join(markup.figure(picture) for picture in pictures if picture is not None)


def _pair(pictures: Sequence[Picture | None]) -> str:
    made = _all(pictures)
    return f'<div class="pair">{made}</div>' if made else ""


def _tiles(table: Table | None) -> list[tuple[str, str, str]]:
    """The first line of the comparison, large: each model's value and the difference."""
    if table is None or not table.lines:
        return []
    line = table.lines[0]
    out = [(model, shown, line.unit) for model, shown in zip(table.models, line.shown())]
    return [*out, ("difference", line.difference(), line.quantity)] if line.difference() else out


def _silent(trace: Trace, patience: int) -> str:
    found = dead_experts(trace, patience)
    if not found:
        if not len(trace.counts):
            return ""
        steps = min(patience, _length(trace))
        return f"<p>Every expert had tokens{f' within the last {steps} steps' if steps > 1 else ''}.</p>"
    lines = "".join(
        f"<p>{text(s.path)}, expert {s.expert}: no token "
        f"{'at all' if s.steps >= _length(trace) else f'in the last {s.steps} steps'}</p>"
        for s in found[:24]
    )
    more = f"<p>and {len(found) - 24} more</p>" if len(found) > 24 else ""
    return f'<div class="warn" role="note"><p><b>Experts without tokens</b></p>{lines}{more}</div>'


def _length(trace: Trace) -> int:
    """How many training steps the counts span."""
    return int(trace.counts.last[-1] - trace.counts.first[0]) + 1


def _dropped(trace: Trace) -> str:
    out = []
    for number, layer in enumerate(trace.layers):
        if len(trace.counts):
            share = dropped_share(trace.demand(number).sum(0), trace.load(number).sum(0))
            if np.isfinite(share) and share > 0:
                out.append(f"{layer.path} {100 * float(share):.2f} %")
    return f"<p>{text('Choices lost to capacity over the whole run: ' + ', '.join(out) + '.')}</p>" if out else ""


def _label_kinds(trace: Trace, sample: Sample) -> list[str]:
    return [kind for kind in trace.labels if f"label.{kind}" in sample.columns]


def _richest(trace: Trace) -> Sample | None:
    """The latest sample with labels; without any, the latest with tokens; without any, the latest."""
    by_wealth = sorted(trace.samples, key=lambda s: (bool(_label_kinds(trace, s)), "token" in s.columns, s.step))
    return by_wealth[-1] if by_wealth else None


def _characteristic(trace: Trace, sample: Sample) -> str:
    found = kinds.characteristic_tokens(trace, sample)
    if not found:
        return ""
    what = "characters" if trace.tokenizer == "bytes" else "tokens"
    out = [
        f"<h3>The most characteristic {what} of every expert</h3><p class='muted'>What comes to an expert more "
        "often than to the others, the most telling first; the number says how many times more often than average.</p>"
    ]
    for i, (path, group) in enumerate(itertools.groupby(found, key=lambda entry: entry[0])):
        rows = "".join(
            f"<tr><td>expert {expert}</td><td>"
            + ("".join(markup.token_chip(_piece(trace, t), c, times) for t, c, times in best) or "–")
            + "</td></tr>"
            for _, expert, best in group
        )
        state = " open" if i == 0 else ""
        out.append(
            f"<details{state}><summary>{text(path)}</summary><div class='scroll tokens' style='max-height: none'>"
            f"<table><tbody>{rows}</tbody></table></div></details>"
        )
    return "".join(out)


def _piece(trace: Trace, token: int) -> str:
    if token in trace.pieces:
        return trace.pieces[token]
    if trace.tokenizer == "bytes" and 0 <= token < 256:
        return chr(token) if 9 <= token <= 10 or 32 <= token < 127 else f"\\x{token:02x}"
    return f"#{token}"


def _origin(data: ReportData) -> str:
    version = data.trace.code.get("moestro") if data.trace is not None else data.environment.get("moestro")
    return f"Made by moestro{f' {version}' if version else ''}. This page is one file and loads nothing."
