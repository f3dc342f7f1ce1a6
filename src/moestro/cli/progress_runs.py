"""Many runs as they are watched: one bar over all of them on a terminal, a line per run elsewhere."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..papers.run import Watch

__all__ = ["Bar", "Lines", "watching"]


class Lines(Watch):
    """A line before and after every run."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def on_start(self, updates: int, done: int) -> None:
        self.say(f"{updates} updates in all" + (f", {done} of them recorded already" if done else ""))

    def on_run(self, title: str, updates: int) -> None:
        self.say(f"{title}: {updates} updates")

    def on_end(self, title: str, line: str) -> None:
        self.say(f"{title}: {line}")

    def close(self) -> None:
        """Give the terminal back."""


class Bar(Lines):
    """One live bar over the updates of all runs; what is said scrolls by above."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self.task: TaskID | None = None

    def on_start(self, updates: int, done: int) -> None:
        self.task = self.progress.add_task("", total=updates, completed=done)
        self.progress.start()

    def on_run(self, title: str, updates: int) -> None:
        if self.task is not None:
            self.progress.update(self.task, description=title)

    def on_update(self, updates: int) -> None:
        if self.task is not None:
            self.progress.advance(self.task, updates)

    def close(self) -> None:
        self.progress.stop()


def watching(stream: TextIO) -> Lines:
    """A bar where the stream is a terminal that can move its cursor, else lines."""
    console = Console(file=stream, highlight=False)
    return Bar(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)
