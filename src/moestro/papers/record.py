"""The record of a comparison: what it holds, how it is judged, and how it is read back."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.version import __version__
from .paper import Arm, Claim, Effect, Figures, Paper

__all__ = ["LEAST_SEEDS", "MINUTES", "MINUTES_PER_SEED", "SCHEMA", "begin", "judge", "spread", "summed", "taken"]

SCHEMA = 1
LEAST_SEEDS = 3
MINUTES = 40.0  # that a record of three seeds may take
MINUTES_PER_SEED = 10.0  # that one seed of all arms may take


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (0 for one value)."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return {"mean": mean, "spread": math.sqrt(variance), "values": list(values)}


def judge(effects: Sequence[float], threshold: float) -> str:
    """ "holds": above 0 in every seed, and the mean reaches the threshold. "fails": the mean is below 0 by more than
    the standard deviation over seeds. Else "within noise"; "undecided" with fewer than three seeds."""
    if len(effects) < LEAST_SEEDS:
        return "undecided"
    found = spread(effects)
    if min(effects) > 0 and found["mean"] >= threshold:
        return "holds"
    return "fails" if found["mean"] < -found["spread"] else "within noise"


def begin(
    paper: Paper, arms: Sequence[Arm], updates: Mapping[str, int], *, smoke: bool, command: str, file: Path
) -> dict[str, Any]:
    """A record to go on with: the one in `file`, or a new one. Raises `UserError` where `file` holds another."""
    settings = _settings(paper, arms, updates, smoke)
    if file.is_file():
        return _resumed(file, paper, settings) | {"command": command or None, "made_with": _versions()}
    return {
        "schema": SCHEMA,
        "slug": paper.entry.slug,
        "number": paper.entry.number,
        "title": paper.entry.title,
        "arxiv": paper.entry.arxiv,
        "smoke": smoke,
        "when": _now(),
        "command": command or None,
        "made_with": _versions(),
        "settings": settings,
        "tuning": {},
        "prepared": {},
        "runs": {},
    }


def summed(record: dict[str, Any], paper: Paper, arms: Sequence[Arm], seeds: Sequence[int]) -> dict[str, Any]:
    """The record with what follows from its runs: the figures of every arm, the claims, the verdict, the minutes."""
    complete = [s for s in seeds if all(str(s) in record["runs"].get(arm.name, {}) for arm in arms)]
    per_seed: list[Figures] = [{arm.name: record["runs"][arm.name][str(s)]["test"] for arm in arms} for s in complete]
    figures = {
        arm.name: {
            name: spread([f[arm.name][name] for f in per_seed]) for name in (per_seed[0][arm.name] if per_seed else ())
        }
        for arm in arms
    }
    claims = [_judged(claim, per_seed, record["smoke"]) for claim in paper.claims]
    published = [
        {"what": p.what, "published": p.figure, "unit": p.unit, "ours": _mean(p.ours, per_seed), "why": p.why}
        for p in paper.published
    ]
    whole = len(complete) == len(seeds) and len(seeds) >= LEAST_SEEDS and not record["smoke"]
    return record | {
        "seeds": complete,
        "complete": whole,
        "minutes": taken(record),
        "summary": {
            "verdict": _overall(claims),
            "claims": claims,
            "arms": figures,
            "published": published,
            "counted": [vars(c) for c in (paper.counted() if paper.counted else ())],
            "figures": dict(paper.figures),
            "notes": list(paper.notes),
        },
    }


def taken(record: Mapping[str, Any]) -> dict[str, Any]:
    """Minutes in all, of the slowest seed (all arms at their learning rate, and what they share), and of tuning."""
    per_seed: dict[str, float] = dict(record["prepared"])
    for runs in record["runs"].values():
        for seed, run in runs.items():
            per_seed[seed] = per_seed.get(seed, 0.0) + run["minutes"]
    tuning = math.fsum(
        tried["minutes"] for tries in record["tuning"].values() for tried in tries.values() if not tried.get("kept")
    )
    total = math.fsum([*per_seed.values(), tuning])
    slowest = max(per_seed.values(), default=0.0)
    return {
        "total": round(total, 2),
        "slowest_seed": round(slowest, 2),
        "tuning": round(tuning, 2),
        "within_budget": slowest <= MINUTES_PER_SEED and (total <= MINUTES or len(per_seed) > LEAST_SEEDS),
    }


def _judged(claim: Claim, per_seed: Sequence[Figures], smoke: bool) -> dict[str, Any]:
    about = {"text": claim.text, "rule": claim.describe(), "main": claim.main}
    if not per_seed:
        return about | {"verdict": "undecided"}
    effects = [_effect(claim.effect, f) for f in per_seed]
    return about | spread(effects) | {"verdict": "undecided" if smoke else judge(effects, claim.threshold)}


def _overall(claims: Sequence[Mapping[str, Any]]) -> str:
    """All main claims hold; one of them fails; or neither."""
    main = [c["verdict"] for c in claims if c["main"]]
    if "undecided" in main:
        return "undecided"
    if all(v == "holds" for v in main):
        return "holds"
    return "fails" if "fails" in main else "within noise"


def _effect(effect: Effect, figures: Figures) -> float:
    try:
        return effect(figures)
    except KeyError as missing:
        raise UserError(f"a claim needs a figure or an arm that is not there: {missing}") from None


def _mean(effect: Effect | None, per_seed: Sequence[Figures]) -> float | None:
    return None if effect is None or not per_seed else spread([_effect(effect, f) for f in per_seed])["mean"]


def _settings(paper: Paper, arms: Sequence[Arm], updates: Mapping[str, int], smoke: bool) -> dict[str, Any]:
    """What makes two records comparable: arms, compute, learning rates and rules. The same for every seed."""
    base = next(a for a in arms if a.name == paper.system)
    whole = updates[base.name] * base.flops()
    described = {}
    for arm in arms:
        model = None if arm.model is None else arm.model.to_dict()
        described[arm.name] = {
            "about": arm.about,
            "equal": arm.equal,
            "updates": updates[arm.name],
            "flops": round(updates[arm.name] * arm.flops() / whole, 4),
            "config": _digest({"model": model, "options": dict(arm.options), "passes": arm.passes}),
        }
    return {
        "revision": paper.revision,
        "smoke": smoke,
        "system": paper.system,
        "grid": list(paper.grid[:1] if smoke else paper.grid),
        "tuning": paper.tuning,
        "arms": described,
        "rules": [claim.describe() for claim in paper.claims],
    }


def _resumed(file: Path, paper: Paper, settings: Mapping[str, Any]) -> dict[str, Any]:
    from ..train.files import read_json

    record = read_json(file)
    if not isinstance(record, dict) or "schema" not in record or record.get("slug") != paper.entry.slug:
        raise UserError(f"{file}: no record of {paper.entry.slug}; name another folder with --out")
    if record["schema"] != SCHEMA:
        raise UserError(
            f"{file}: a record of schema {record['schema']}, not {SCHEMA}; name another folder, or remove it"
        )
    if record["settings"] != settings:
        changed = [name for name, value in settings.items() if record["settings"].get(name) != value]
        raise UserError(
            f"{file}: a record of other settings ({', '.join(changed)}); name another folder with --out, or remove it"
        )
    return record


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def _versions() -> dict[str, Any]:
    import torch

    return {
        "moestro": __version__,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "numpy": importlib.metadata.version("numpy"),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
