"""A system that exists only here: its arms differ by known amounts, and every training takes no time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moestro.core.errors import UserError
from moestro.papers.catalogue import Entry
from moestro.papers.paper import (
    Arm,
    Bars,
    Claim,
    Computed,
    Counted,
    Difference,
    Job,
    Outcome,
    Paper,
    Published,
)

ENTRY = Entry(99, "made-up", "A System Made Up for Tests", 2020, "2001.00001", "nothing")

LOSS = {"system": 1.0, "dense": 1.5, "plain": 1.1}
JITTER = (0.0, 0.02, -0.02, 0.01)  # by seed, the same for every arm but plain's, where it is ten times as large


def load(folder: Path) -> list[float]:
    file = folder / "made-up.json"
    if not file.is_file():
        raise UserError(f"{file}: missing; it comes from nowhere")
    return json.loads(file.read_text())


def sample(folder: Path) -> None:
    (folder / "made-up.json").write_text("[0.5, 0.25]")


def train(job: Job) -> Outcome:
    """A loss with its least at learning rate 0.01; figures from tables."""
    for _ in range(job.updates):
        job.tick(1)
    far = math.log10(job.lr / 0.01) ** 2
    jitter = JITTER[job.seed] * (10 if job.arm.name == "plain" else 1)
    loss = LOSS[job.arm.name] + jitter + far
    curve = [(0.0, 2.0), (float(job.updates), loss)]
    return Outcome(validation=loss + job.data[0], test={"loss": loss, "accuracy": 1 - loss / 4}, curves={"loss": curve})


def arms(smoke: bool) -> tuple[Arm, ...]:
    return (
        Arm(name="system", about="all of it", cost=200.0),
        Arm(name="dense", about="its twin", cost=201.0, equal="both"),
        Arm(name="plain", about="half the passes", cost=100.0, equal="flops"),
    )


CLAIMS = (
    Claim(text="better than dense", effect=Difference(figure="loss", of="system", than="dense"), threshold=0.4),
    Claim(
        text="better than plain",
        effect=Difference(figure="accuracy", of="system", than="plain", better="higher"),
        main=False,
    ),
)


def made_up(**changes: Any) -> Paper:
    settings: dict[str, Any] = {
        "entry": ENTRY,
        "parts": {"choice": "moestro.routers.config:TopK"},
        "example": "from moestro.routers.config import TopK\nprint(TopK(k=2))",
        "data": load,
        "sample": sample,
        "arms": arms,
        "system": "system",
        "updates": 10,
        "train": train,
        "grid": (0.001, 0.01, 0.1),
        "figures": {"loss": "nats per token, lower is better", "accuracy": "share of right answers"},
        "claims": CLAIMS,
        "picture": Bars(figures=("loss", "accuracy")),
        "published": (
            Published(what="loss below dense", figure=0.3, unit="nats", ours=CLAIMS[0].effect),
            Published(what="BLEU", figure="+2", why="too large"),
        ),
        "counted": lambda: (Counted(what="parameters", ours=1234567, published=1.2e6),),
        "notes": ("made up",),
    }
    return Paper(**(settings | changes))


def gap(value: float) -> Computed:
    """An effect that is the same for every seed."""
    return Computed(text="a constant", function=lambda figures: value)
