"""Training as it is watched: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from ..train.observe import Arm, Observer, StepInfo
from .style import count, duration

__all__ = ["Bars", "Lines", "Watcher", "watcher"]

EVERY = 5.0  # seconds between plain lines
NARROW = 100  # columns below which names of figures are shortened
SHORT = {"bits/byte": "b/B", "tokens/s": "tok/s", "left": "", "accuracy": "acc"}


class Watcher(Observer):
    """An observer that holds a terminal until it is closed."""

    def close(self) -> None:
        """Give the terminal back."""


def watcher(stream: TextIO) -> Watcher:
    """Bars where the stream is a terminal that can move its cursor, else lines."""
    console = Console(file=stream, highlight=False)
    return Bars(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)


class Lines(Watcher):
    """A line at the start, then at most one every few seconds and one per evaluation."""

    def __init__(self, console: Console, clock: Any = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.said: dict[str, float] = {}
        self.width = 0

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def on_start(self, arms: Sequence[Arm], corpus: Mapping[str, Any]) -> None:
        self.width = max(len(arm.name) for arm in arms)
        for arm in arms:
            self.say(describe(arm, self.width))

    def on_step(self, info: StepInfo) -> None:
        now = self.clock()
        if now - self.said.get(info.arm, -math.inf) >= EVERY or info.step == info.steps:
            self.said[info.arm] = now
            parts = (f"{name} {value}" for name, value in figures(info).items() if value)
            self.say(f"{info.arm:<{self.width}}  step {info.step}/{info.steps}  " + "  ".join(parts))

    def on_eval(self, arm: str, row: Mapping[str, Any]) -> None:
        self.say(f"{arm:<{self.width}}  step {row['step']}  validation {judged(row)}")

    def on_message(self, text: str) -> None:
        self.say(text)


class Bars(Watcher):
    """One live bar per model, with its figures; messages scroll by above."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.tasks: dict[str, TaskID] = {}

    def on_start(self, arms: Sequence[Arm], corpus: Mapping[str, Any]) -> None:
        width = max(len(arm.name) for arm in arms)
        for arm in arms:
            self.console.print(describe(arm, width), markup=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            expand=True,
            refresh_per_second=4,
        )
        for arm in arms:
            self.tasks[arm.name] = self.progress.add_task(
                f"{arm.name:<{width}}", total=arm.steps, completed=arm.start, figures=""
            )
        self.progress.start()

    def on_step(self, info: StepInfo) -> None:
        if self.progress is not None:
            shown = {name: value for name, value in figures(info).items() if value}
            if self.console.width < NARROW:
                shown = {SHORT.get(name, name): value for name, value in shown.items()}
            text = ("  " if self.console.width >= NARROW else " ").join(f"{n} {v}".strip() for n, v in shown.items())
            self.progress.update(self.tasks[info.arm], completed=info.step, figures=text)

    def on_eval(self, arm: str, row: Mapping[str, Any]) -> None:
        self.on_message(f"{arm}  step {row['step']}  validation {judged(row)}")

    def on_message(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def describe(arm: Arm, width: int) -> str:
    """One line on a model before it trains."""
    resumed = f", from step {arm.start}" if arm.start else ""
    return (
        f"{arm.name:<{width}}  {count(arm.params)} parameters, {count(arm.active)} active, "
        f"{count(arm.flops_per_token)} FLOPs per token, {arm.steps} steps{resumed}"
    )


def figures(info: StepInfo) -> dict[str, str]:
    """What is shown of a step: name -> text. Empty texts are left out."""
    row = info.row
    return {
        "loss": f"{row['loss']:.4f}",
        "bits/byte": _number(row.get("bits_per_byte"), ".4f"),
        **{name: _number(value, ".4f") for name, value in _of_task(row).items()},
        "tokens/s": count(row["tokens_per_second"]) if row.get("tokens_per_second") else "",
        "left": "" if info.seconds_left is None else duration(info.seconds_left),
        "load": _number(row.get("load_entropy"), ".3f"),
    }


def judged(row: Mapping[str, Any]) -> str:
    """What an evaluation says in a line: bits per byte of text, else nats and the task's metrics."""
    if "bits_per_byte" in row:
        return f"bits/byte {row['bits_per_byte']:.4f}"
    return "  ".join(f"{name} {value:.4f}" for name, value in _of_task(row).items())


def _of_task(row: Mapping[str, Any]) -> dict[str, float]:
    return {"nats": row["nats"], **row["metrics"]} if "metrics" in row else {}


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
