"""The runner: every arm with every seed, at equal compute, into one record that can be gone on with."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..core.errors import UserError
from ..core.folders import data_root
from ..train.files import write_json
from .paper import Arm, Diverged, Job, Outcome, Paper, find_part
from .picture import draw
from .record import LEAST_SEEDS, MINUTES, MINUTES_PER_SEED, begin, summed

__all__ = ["Watch", "check", "equal_updates", "reproduce"]

TWIN = 0.01  # of training FLOPs, by which an arm that is to be equal in both may differ


class Watch:
    """Told of what happens; every method may be overridden, none needs to be."""

    def on_start(self, updates: int, done: int) -> None:
        """Before the first run. updates: of all runs together; done: those recorded already."""

    def on_run(self, title: str, updates: int) -> None:
        """Before each run."""

    def on_update(self, updates: int) -> None:
        """After so many updates of the current run."""

    def on_end(self, title: str, line: str) -> None:
        """After each run, with its figures in one line."""

    def say(self, text: str) -> None:
        """Something worth a line."""


def reproduce(
    paper: Paper,
    out: Path | str,
    *,
    seeds: int = LEAST_SEEDS,
    smoke: bool = False,
    data: Path | None = None,
    watch: Watch | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train every arm of `paper` with seeds 0 .. seeds - 1; write `record.json` and `picture.svg`, `.png` into `out`.

    The record is written after every run, and the same call goes on with the runs that are missing; more seeds may be
    asked for later. smoke: a few updates, one learning rate, on rows that the paper writes itself; no verdict. data:
    folder of the data (default: $MOESTRO_DATA, else the user's cache folder). command: what to type, for the record.

    Errors: `UserError` for missing data, a record of other settings, arms that are not of equal compute, figures that
    are not finite. What was recorded before is intact then.
    """
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, found {seeds}")
    out, watch = Path(out), watch or Watch()
    arms = tuple(paper.arms(smoke))
    check(paper, arms)
    updates = equal_updates(paper, arms, smoke)
    file = out / "record.json"
    record = begin(paper, arms, updates, smoke=smoke, command=command, file=file)
    out.mkdir(parents=True, exist_ok=True)
    running = _Running(paper, arms, updates, record, file, watch, smoke, seeds)
    try:
        with _data_folder(paper, data, smoke) as folder:
            running.go(folder)
    except UserError as error:
        raise UserError(f"{paper.entry.slug}: {error}") from error
    if running.record["seeds"]:
        draw(running.record, paper.picture, out / "picture")
    return running.record


def check(paper: Paper, arms: Sequence[Arm]) -> None:
    """Raise `UserError` for parts that do not exist and for arms that cannot be compared."""
    for name in paper.parts.values():
        find_part(name)
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise UserError(f"{paper.entry.slug}: two arms of one name; found {', '.join(names)}")
    if paper.system not in names:
        raise UserError(f"{paper.entry.slug}: no arm is called {paper.system!r}, its system; found {', '.join(names)}")


def equal_updates(paper: Paper, arms: Sequence[Arm], smoke: bool = False) -> dict[str, int]:
    """Arm -> optimiser steps, from the FLOPs that the configs count, see `Arm.equal`."""
    system = next(arm for arm in arms if arm.name == paper.system)
    steps = paper.smoke_updates if smoke else paper.updates
    each = system.flops()
    found = {}
    for arm in arms:
        if arm.equal == "flops":
            found[arm.name] = max(1, round(steps * each / arm.flops()))
            continue
        apart = arm.flops() / each - 1
        if arm.equal == "both" and abs(apart) > TWIN:
            raise UserError(
                f"{paper.entry.slug}: arm {arm.name} takes {apart:+.1%} of the FLOPs of {system.name} per update; they "
                "must be within 1 percent, or the arm be equal in flops or in updates alone"
            )
        found[arm.name] = steps
    return found


@dataclasses.dataclass
class _Running:
    """A comparison while it runs."""

    paper: Paper
    arms: tuple[Arm, ...]
    updates: dict[str, int]
    record: dict[str, Any]
    file: Path
    watch: Watch
    smoke: bool
    count: int

    def __post_init__(self) -> None:
        recorded = {int(seed) for runs in self.record["runs"].values() for seed in runs}
        self.seeds = sorted({*range(self.count), *recorded})
        self.grid = self.paper.grid[:1] if self.smoke else self.paper.grid
        self.warned = False

    def go(self, folder: Path) -> None:
        todo, done = self._work()
        data = self.paper.data(folder) if todo else None
        self.watch.on_start(todo + done, done)
        for arm in self.arms:
            self._tune(arm, data)
        for seed in self.seeds:
            for arm in self.arms:
                if str(seed) not in self._runs(arm):
                    outcome, minutes = self._train(arm, seed, self._rate(arm), self.updates[arm.name], data)
                    self._keep(arm, seed, self._rate(arm), _figures(outcome), minutes)
        self._write()
        shutil.rmtree(self.file.parent / "work", ignore_errors=True)

    def _work(self) -> tuple[int, int]:
        """Updates that are to be made, and that were made before."""
        todo = done = 0
        for arm in self.arms:
            steps, trial = self.updates[arm.name], self._trial(arm)
            tried = self.record["tuning"].get(arm.name, {})
            trials = len(self.grid) if len(self.grid) > 1 else 0
            kept = 1 if trials and self.paper.tuning == 1 else 0  # the chosen trial is the first seed's run
            had = max(0, len(self._runs(arm)) - kept * (self._chosen(arm) is not None))
            total, before = trials * trial + (len(self.seeds) - kept) * steps, len(tried) * trial + had * steps
            todo, done = todo + total - before, done + before
        return todo, done

    # Learning rates -----------------------------------------------------------------------------------------------

    def _tune(self, arm: Arm, data: Any) -> None:
        """Try the learning rates that were not tried yet, and choose one, by validation alone."""
        if len(self.grid) == 1 or self._chosen(arm) is not None:
            return
        tries: dict[str, Any] = self.record["tuning"].setdefault(arm.name, {})
        for lr in self.grid:
            if repr(lr) in tries:
                continue
            outcome, minutes = self._train(arm, self.seeds[0], lr, self._trial(arm), data, "choosing the learning rate")
            tries[repr(lr)] = {"validation": _finite(outcome.validation), "minutes": round(minutes, 3)}
            if self.paper.tuning == 1 and _best(tries) == repr(lr):
                for tried in tries.values():
                    tried.pop("run", None)  # test figures of what is not chosen are not kept
                tries[repr(lr)]["run"] = _figures(outcome)
            self._write()
        best = _best(tries)
        if best is None:
            raise UserError(f"arm {arm.name}: no learning rate of {', '.join(tries)} gave a finite validation figure")
        tries[best]["chosen"] = True
        if float(best) in (min(self.grid), max(self.grid)):
            tries[best]["edge"] = True
            self.watch.say(f"{arm.name}: the best learning rate, {best}, lies at the edge of the grid")
        if "run" in tries[best]:
            tries[best]["kept"] = True
            self._keep(arm, self.seeds[0], float(best), tries[best].pop("run"), tries[best]["minutes"])
        self._write()

    def _trial(self, arm: Arm) -> int:
        return max(1, round(self.paper.tuning * self.updates[arm.name]))

    def _chosen(self, arm: Arm) -> float | None:
        tries = self.record["tuning"].get(arm.name, {})
        return next((float(lr) for lr, tried in tries.items() if tried.get("chosen")), None)

    def _rate(self, arm: Arm) -> float:
        chosen = self._chosen(arm)
        return self.grid[0] if chosen is None else chosen

    # Runs ---------------------------------------------------------------------------------------------------------

    def _train(self, arm: Arm, seed: int, lr: float, updates: int, data: Any, why: str = "") -> tuple[Outcome, float]:
        """Train one arm; returns its outcome and the minutes it took."""
        made = []

        def tick(updates: int = 1) -> None:
            made.append(updates)
            self.watch.on_update(updates)

        job = Job(
            arm=arm,
            seed=seed,
            lr=lr,
            updates=updates,
            data=data,
            shared=self._shared(seed, data),
            smoke=self.smoke,
            tick=tick,
        )
        title = f"{arm.name}, seed {seed}, learning rate {lr:g}" + (f" ({why})" if why else "")
        self.watch.on_run(title, updates)
        outcome, minutes = _timed(lambda: self._outcome(job, choosing=bool(why)), seed)
        self.watch.on_update(updates - sum(made))
        line = ", ".join(f"{name} {value:.4g}" for name, value in outcome.test.items()) if not why else ""
        self.watch.on_end(title, f"validation {outcome.validation:.4g}{', test: ' if line else ''}{line}")
        return outcome, minutes

    def _outcome(self, job: Job, choosing: bool) -> Outcome:
        try:
            return (job.arm.train or self.paper.train)(job)
        except Diverged:
            if not choosing:
                raise
            return Outcome(validation=math.inf, test={})

    def _shared(self, seed: int, data: Any) -> Path:
        """The folder that all arms of a seed read, filled."""
        folder = self.file.parent / "work" / f"seed-{seed}"
        prepare = self.paper.prepare
        if prepare is None or (folder.is_dir() and str(seed) in self.record["prepared"]):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        system = next(arm for arm in self.arms if arm.name == self.paper.system)
        steps = self.updates[system.name]
        job = Job(arm=system, seed=seed, lr=self.grid[0], updates=steps, data=data, shared=folder, smoke=self.smoke)
        self.watch.say(f"seed {seed}: preparing what all arms begin with")
        _, minutes = _timed(lambda: prepare(job), seed)
        self.record["prepared"][str(seed)] = round(minutes, 3)
        self._write()
        return folder

    def _keep(self, arm: Arm, seed: int, lr: float, figures: dict[str, Any], minutes: float) -> None:
        for name, value in figures["test"].items():
            if name not in self.paper.figures:
                raise UserError(f"arm {arm.name}: the figure {name!r} is not described in Paper.figures")
            if value is None:
                raise UserError(f"arm {arm.name}, seed {seed}, learning rate {lr:g}: {name} is not finite")
        runs = self.record["runs"].setdefault(arm.name, {})
        runs[str(seed)] = {"lr": lr, "minutes": round(minutes, 3), **figures}
        self._write()

    def _runs(self, arm: Arm) -> Mapping[str, Any]:
        return self.record["runs"].get(arm.name, {})

    def _write(self) -> None:
        self.record = summed(self.record, self.paper, self.arms, self.seeds)
        write_json(self.file, self.record)
        if not (self.record["minutes"]["within_budget"] or self.warned):
            self.warned = True
            self.watch.say(f"over the budget of {MINUTES:g} minutes in all and {MINUTES_PER_SEED:g} for one seed")


def _best(tries: Mapping[str, Any]) -> str | None:
    known = {lr: tried["validation"] for lr, tried in tries.items() if tried["validation"] is not None}
    return min(known, key=lambda lr: known[lr]) if known else None


def _figures(outcome: Outcome) -> dict[str, Any]:
    """What is recorded of a run, to seven digits."""
    made: dict[str, Any] = {
        "validation": _finite(outcome.validation),
        "test": {name: _finite(value) for name, value in outcome.test.items()},
    }
    if outcome.curves:
        made["curves"] = {
            name: [[_finite(x), _finite(y)] for x, y in points] for name, points in outcome.curves.items()
        }
    return made


def _finite(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _timed(work: Callable[[], Any], seed: int) -> tuple[Any, float]:
    """What `work` returns with torch's generator seeded, and minutes. The caller's generators are left as they were."""
    began = time.perf_counter()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        made = work()
    return made, (time.perf_counter() - began) / 60


@contextlib.contextmanager
def _data_folder(paper: Paper, data: Path | None, smoke: bool) -> Iterator[Path]:
    if not smoke:
        yield data or data_root()
        return
    with TemporaryDirectory() as folder:
        paper.sample(Path(folder))
        yield Path(folder)
