"""The main job over several seeds: is the sparse model better than its dense twin, and by how much?"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError
from ..train.config import TrainRun
from ..train.files import write_json
from ..train.run import run
from .machine import describe_machine

__all__ = ["measure", "paired", "verdict"]

# Two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

MARGIN = 0.03  # bits per byte that the mean difference must reach for the claim to hold


def paired(differences: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and 95 percent interval (Student's t) of paired differences."""
    n = len(differences)
    if not 2 <= n <= len(_T95) + 1:
        raise UserError(f"an interval needs 2 to {len(_T95) + 1} seeds, not {n}")
    mean = math.fsum(differences) / n
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    half = _T95[n - 2] * spread / math.sqrt(n)
    return {"mean": mean, "standard_deviation": spread, "low": mean - half, "high": mean + half}


def verdict(differences: Sequence[float]) -> str:
    """ "holds" if sparse is lower in at least 4 of 5 seeds, by MARGIN on the mean, with 0 outside the interval; "fails"
    if the interval lies above 0; else "within noise". Differences are sparse minus dense."""
    found = paired(differences)
    lower = sum(d < 0 for d in differences)
    if lower >= math.ceil(0.8 * len(differences)) and found["mean"] <= -MARGIN and found["high"] < 0:
        return "holds"
    return "fails" if found["low"] > 0 else "within noise"


def measure(
    config: TrainRun,
    seeds: Sequence[int],
    out: Path,
    say: Callable[[str], None],
    *,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Train the pair once per seed and write the record to the file `out`, after each seed: a run that is interrupted
    goes on with the seeds that are missing.

    keep: a folder for the runs (default: a temporary one, removed). A seed's entry carries the settings it was made
    with; a record made with other settings is refused.
    """
    if not config.twin:
        raise UserError("the comparison needs the dense twin; set twin to true")
    shared = {k: v for k, v in config.to_dict().items() if k not in ("seed", "report")}
    record = _begun(out, shared)
    for seed in seeds:
        if str(seed) in record["seeds"]:
            say(f"seed {seed}: recorded already")
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            folder = (keep or Path(temporary)) / f"seed-{seed}"
            result = run(config.replace(seed=seed, report=keep is not None), out=folder)
        if not result.complete:
            raise UserError(f"seed {seed} was stopped; run the same command again to go on")
        minutes = (time.perf_counter() - began) / 60
        lines = {line.name: line.to_dict() for line in result.lines}
        difference = lines["sparse"]["bits_per_byte"] - lines["dense"]["bits_per_byte"]
        record["seeds"][str(seed)] = {"minutes": round(minutes, 2), "difference": difference, "table": lines}
        say(f"seed {seed}: sparse minus dense {difference:+.4f} bits per byte, {minutes:.1f} minutes")
        _write(out, _summed(record))
    return _summed(record)


def _begun(out: Path, shared: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"config": shared, "seeds": {}}
    if out.is_file():
        before = json.loads(out.read_text(encoding="utf-8"))
        if before.get("config") != shared:
            raise UserError(f"{out}: a record of other settings; name another file, or remove it")
        record["seeds"] = before["seeds"]
    return record


def _summed(record: dict[str, Any]) -> dict[str, Any]:
    differences = [entry["difference"] for entry in record["seeds"].values()]
    summary: dict[str, Any] = {"seeds": len(differences), "sparse_lower": sum(d < 0 for d in differences)}
    if len(differences) > 1:
        summary |= {"equal_steps": paired(differences), "verdict": verdict(differences)}
        timed = [_at_time(entry["table"]) for entry in record["seeds"].values()]
        known = [d for d in timed if d is not None]
        if len(known) == len(timed):
            summary["equal_time"] = paired(known)
    claim = (
        "validation bits per byte at equal steps: the sparse model is lower than its dense twin of equal active FLOPs "
        f"in at least 4 of 5 seeds, by at least {MARGIN} on the mean, and the 95 percent interval excludes 0"
    )
    machine = describe_machine(torch.device("cpu"))
    return {"claim": claim, "summary": summary, "machine": machine, **record}


def _at_time(table: dict[str, Any]) -> float | None:
    """Sparse minus dense at equal training time; None where an arm was not evaluated that early."""
    sparse, dense = (table[name]["bits_per_byte_at_time"] for name in ("sparse", "dense"))
    return None if sparse is None or dense is None else sparse - dense


def _write(out: Path, record: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record)
