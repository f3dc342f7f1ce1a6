"""What a training tells whoever watches it: progress bars, logs, tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Arm", "Observer", "Several", "StepInfo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One model in training. name: "sparse" or "dense" (with a twin), or "model". start: the step it begins with."""

    name: str
    folder: Path
    steps: int
    start: int
    params: int
    active: int
    flops_per_token: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInfo:
    """One optimiser step. row: the row of `metrics.jsonl`, see `layout`. counts: layer path -> [E] choices (tensors).

    seconds_left: estimate for this arm, None at first.
    """

    arm: str
    step: int
    steps: int
    row: Mapping[str, Any]
    counts: Mapping[str, Any]
    seconds_left: float | None


class Observer:
    """Called by the first rank only. Every method may be overridden; none needs to be."""

    def on_start(self, arms: Sequence[Arm], corpus: Mapping[str, Any]) -> None:
        """Before the first step. corpus: the content of `corpus.json`."""

    def on_step(self, info: StepInfo) -> None:
        """After every optimiser step."""

    def on_eval(self, arm: str, row: Mapping[str, Any]) -> None:
        """After every evaluation. row: of `metrics.jsonl`."""

    def on_save(self, arm: str, step: int) -> None:
        """After a state became the one that resume starts from."""

    def on_message(self, text: str) -> None:
        """Something worth a line: skipped files, silent experts, a stop."""

    def on_end(self, result: Any) -> None:
        """After the last file was written. result: `run.Result`."""


class Several(Observer):
    """Passes everything on to several observers, in order."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def on_start(self, arms: Sequence[Arm], corpus: Mapping[str, Any]) -> None:
        for o in self.observers:
            o.on_start(arms, corpus)

    def on_step(self, info: StepInfo) -> None:
        for o in self.observers:
            o.on_step(info)

    def on_eval(self, arm: str, row: Mapping[str, Any]) -> None:
        for o in self.observers:
            o.on_eval(arm, row)

    def on_save(self, arm: str, step: int) -> None:
        for o in self.observers:
            o.on_save(arm, step)

    def on_message(self, text: str) -> None:
        for o in self.observers:
            o.on_message(text)

    def on_end(self, result: Any) -> None:
        for o in self.observers:
            o.on_end(result)
