"""The frame of every record: what was measured, where, under which load; and what is derived from raw times."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ops import native
from .goals import judged
from .machine import describe_machine, load_average, peak_memory, warn_if_busy
from .timing import ratio, spread

__all__ = ["Regimes", "begin", "compared", "finish", "summed"]

SCHEMA = 1
DIGITS = 6  # of a time that are kept

Regimes = dict[str, dict[str, Any]]  # regime -> {"rows": contender -> {"seconds": [...] per round, ...}, ...}


def begin(what: str, device: torch.device, seed: int, rounds: int) -> dict[str, Any]:
    """A record that has no figures yet. "warning" is there where the machine is busy."""
    load = load_average()
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "what": what,
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": describe_machine(device) | {"kernels": native.reason()},
        "load_average": {"before": load},
        "seed": seed,
        "rounds": rounds,
    }
    warning = warn_if_busy(load)
    return record if warning is None else record | {"warning": warning}


def finish(record: dict[str, Any], benchmark: str, regimes: Regimes, device: torch.device) -> dict[str, Any]:
    """The record with its regimes, goals, peak memory and the load at the end. Raw times are rounded first, so that
    everything derived can be derived again from the file."""
    for regime in regimes.values():
        for row in regime["rows"].values():
            if "seconds" in row:
                row["seconds"] = [float(f"{s:.{DIGITS}g}") for s in row["seconds"]]
        regime |= summed(regime)
    seconds = {
        name: {who: row.get("seconds", []) for who, row in regime["rows"].items()} for name, regime in regimes.items()
    }
    record["load_average"]["after"] = load_average()
    return record | {
        "regimes": regimes,
        "goals": judged(benchmark, seconds),
        "peak_memory": peak_memory(device),
    }


def summed(regime: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from a regime's raw times: milliseconds per row, and how many times as fast as each other contender
    the first one ("ours") is."""
    rows = {
        name: row | {"milliseconds": dataclasses.asdict(spread([1e3 * s for s in row["seconds"]]))}
        if "seconds" in row
        else row
        for name, row in regime["rows"].items()
    }
    times = timed(regime)
    ours = regime["ours"]
    if ours not in times:
        return {"rows": rows, "ratios": {}}
    return {"rows": rows, "ratios": {name: compared(times, ours, name) for name in times if name != ours}}


def compared(times: Mapping[str, Sequence[float]], ours: str, to: str) -> dict[str, float]:
    """Speed of `ours` over another's: round by round, and that of the fastest rounds of both."""
    return dataclasses.asdict(ratio(times, ours, to)) | {"fastest": min(times[to]) / min(times[ours])}


def timed(regime: Mapping[str, Any]) -> dict[str, list[float]]:
    """Contender -> seconds per round, of those that were timed."""
    return {name: row["seconds"] for name, row in regime["rows"].items() if "seconds" in row}
