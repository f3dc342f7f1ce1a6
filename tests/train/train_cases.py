"""Small runs for the tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from moestro.losses import RoutingEntropy, SwitchBalance
from moestro.moe import MoELayer
from moestro.optim import AdamW
from moestro.tasks import Text
from moestro.train.config import TrainRun
from moestro.train.observe import Observer, StepInfo
from moestro.train.presets import preset

TIMES = ("seconds", "tokens_per_second")


def text(folder: Path, name: str = "text.txt") -> Path:
    """A text with some structure, 20 kB."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 7))) for _ in range(99)]
    path = folder / name
    path.write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(500)), encoding="utf-8")
    return path


def tiny(folder: Path, **changes: Any) -> TrainRun:
    """A run of twelve steps without a twin, on `text`."""
    path = folder / "text.txt"
    if not path.is_file():
        text(folder)
    config = preset("tiny").replace(
        data=Text(path=str(path), cache=str(folder / "cache")),
        optimizer=AdamW(lr=3e-3),
        twin=False,
        report=False,
        tensorboard=False,
        steps=12,
        batch_size=6,
        seq_len=16,
        eval_every=6,
        eval_windows=8,
    )
    return config.replace(**changes)


def with_moe(config: TrainRun, **changes: Any) -> TrainRun:
    """The run with another routed layer."""
    assert config.model.moe is not None
    return config.replace(model=config.model.replace(moe=config.model.moe.replace(**changes)))


def strong(coefficient: float = 1.0) -> dict[str, Any]:
    """Balance losses that matter: a wrong one shows."""
    return {"losses": (SwitchBalance(coefficient=coefficient), RoutingEntropy(coefficient=0.0))}


def rows(folder: Path, kind: str = "") -> list[dict[str, Any]]:
    """Rows of metrics without times."""
    made = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in made if r["kind"] == kind or not kind]


class Steps(Observer):
    """Keeps what it is told; calls `then` after every step."""

    def __init__(self, then: Any = None) -> None:
        self.then = then
        self.infos: list[StepInfo] = []
        self.said: list[str] = []

    def on_step(self, info: StepInfo) -> None:
        self.infos.append(info)
        if self.then is not None:
            self.then(info)

    def on_message(self, text: str) -> None:
        self.said.append(text)


__all__ = ["MoELayer", "Steps", "rows", "strong", "text", "tiny", "with_moe"]
