"""`run`: from a config to a run folder with weights, metrics, table, trace and report; or on from where one ended."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..adapt.config import Mixture
from ..core.errors import UserError
from ..trace.record import Recorder
from . import manifest as manifests
from . import settings
from .arm import Arm
from .compare import Line, table
from .config import TrainRun
from .files import read_json
from .layout import Layout, claim
from .material import Seen, open_material
from .models import is_routed
from .observe import Observer, Several
from .ranks import Ranks, joined
from .save import Store, read_state
from .start import start
from .stop import Stop, listening

__all__ = ["Result", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gave. complete: False when it was asked to stop before its last step; it can then be resumed.

    step: the least number of steps of any arm. lines: the final table, one line per arm. report: its path, or None.
    """

    folder: Path
    complete: bool
    step: int
    lines: tuple[Line, ...]
    report: Path | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "complete": self.complete,
            "step": self.step,
            "table": [line.to_dict() for line in self.lines],
            "report": None if self.report is None else str(self.report),
        }


def run(
    config: TrainRun | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Observer | None = None,
    name: str = "run",
    command: str = "",
) -> Result:
    """Train as `config` says, alone or as one of the processes that torchrun started.

    out: the run folder; default `runs/<time>-<name>`. resume: continue the run in `out`; without a config, with its
    own settings (see `settings.check` for what may change). progress: is told everything, on the first rank.
    command: what to type to make the run again, for the report. SIGTERM and SIGINT finish the running step, save and
    return an incomplete result.

    Errors: `UserError` for whatever the user can put right: folders, data, settings, damaged files, full disks, a loss
    that is not finite. What was saved before is intact then.
    """
    if resume and out is None:
        raise UserError("resume needs the folder of the run; name it with out")
    if config is None and not resume:
        raise UserError("a new run needs a config; take one of moestro presets")
    observer = progress or Observer()
    if config is None:
        config = _recorded(Path(str(out)))
    if config.adapters is not None and not config.start:
        raise UserError("adapters need weights to go on; name their folder with start")
    with joined(config.device) as ranks, _own_randomness(), _threads(config.threads), listening() as stop:
        layout = Layout(ranks.agree(Path(out) if out is not None else _default(name)))
        ranks.together(lambda: claim(layout.root, resume))
        with _watched(observer, config.tensorboard, ranks) as watched:
            training = _Run(config, layout, resume, ranks, watched, command)
            return training.go(stop)


class _Run:
    def __init__(
        self, config: TrainRun, layout: Layout, resume: bool, ranks: Ranks, observer: Observer, command: str
    ) -> None:
        self.layout, self.ranks, self.observer, self.command = layout, ranks, observer, command
        recorded = _recorded(layout.root) if resume and layout.manifest.is_file() else None
        self.stores: dict[Path, Store] = ranks.together(self._open) or {}
        self.material = open_material(config, recorded, layout, ranks, observer.on_message)
        model = self.material.fill(config)
        adapters = None if config.adapters is None else config.adapters.replace(seed=config.seed)
        self.config = config.replace(model=model, adapters=adapters)
        if recorded is not None:
            found = settings.check(recorded, self.config, manifests.read(layout.root).step)
            if found:
                observer.on_message(f"resumed with other settings: {'; '.join(map(str, found))}")

    def go(self, stop: Stop) -> Result:
        """Train, and finish."""
        self.ranks.together(self._begin)
        arms = [self._arm(name, config, layout) for name, config, layout in self._parts()]
        self._announce(arms)
        if all(arm.step >= arm.config.steps for arm in arms) and self.layout.summary.is_file():
            self.observer.on_message(f"{self.layout.root}: this run is complete already")
            return self._result(arms, True)
        if not all(arm.advance(border, stop) for border in self.config.borders() for arm in arms):
            steps = " and ".join(f"{arm.step} ({arm.name})" for arm in arms)
            self.observer.on_message(
                f"stopped after step {steps} of {self.config.steps}; everything is saved, continue with resume"
            )
            return self._result(arms, False)
        from .finish import finish  # draws pictures: loaded when there is something to draw

        lines = self._lines(arms)
        say = self.observer.on_message
        self.ranks.together(lambda: finish(self.config, self.stores, lines, self.material, self.command, say))
        return self._result(arms, True)

    # Parts --------------------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[tuple[str, TrainRun, Layout]]:
        """(name, config, layout) of every arm."""
        if not self.config.twin:
            yield "model", self.config, self.layout
            return
        from ..models.twin import dense_twin

        yield "sparse", self.config, self.layout
        dense = dense_twin(self.config.model, self.config.seq_len)
        yield "dense", self.config.replace(model=dense, twin=False, knobs=()), self.layout.twin

    def _open(self) -> dict[Path, Store]:
        """The stores that exist, verified."""
        found = {part.root: Store.open(part) for part in (self.layout, self.layout.twin)}
        return {root: store for root, store in found.items() if store is not None}

    def _begin(self) -> None:
        """Write what does not change during training, and what resuming changed in the settings."""
        for _, config, layout in self._parts():
            if layout.root not in self.stores:
                layout.root.mkdir(parents=True, exist_ok=True)
                self.stores[layout.root] = Store(layout)
            store = self.stores[layout.root]
            texts = {"config.json": config.to_dict(), "corpus.json": self.material.record}
            store.put({**texts, "tokenizer.json": json.loads(self.material.tokenizer.to_json())})
            store.commit(complete=store.complete and store.step >= config.steps)

    def _arm(self, name: str, config: TrainRun, layout: Layout) -> Arm:
        seen = self.material.seen(config.seq_len)
        store = self.stores.get(layout.root)
        recorder = None
        if store is not None and (is_routed(config.model) or isinstance(config.adapters, Mixture)):
            recorder = self._recorder(config, store, seen)
        feed = self.material.feed(config)
        arm = Arm(name, config, feed, self.ranks, store, self.observer, recorder, seen)
        saved = read_state(layout.root, manifests.read(layout.root))
        if saved is not None:
            arm.restore(saved, layout.states)
        elif config.start:
            start(arm.model, config.start)
        return arm

    def _recorder(self, config: TrainRun, store: Store, seen: Seen) -> Recorder:
        pieces = self.material.pieces
        before = store.state_file("trace.safetensors")
        if before is not None:
            return Recorder.resume(before, config.recording, pieces=pieces)
        return Recorder(
            config.recording,
            labels=seen.labels,
            tokenizer="bytes" if pieces is None else "tokenizer.json",
            pieces=pieces,
            run={
                "seed": config.seed,
                "steps": config.steps,
                "batch_size": config.batch_size,
                "seq_len": config.seq_len,
            },
            model=config.model.to_dict(),
            data={"title": self.material.record["title"], "key": self.material.key},
        )

    def _announce(self, arms: list[Arm]) -> None:
        if self.ranks.first:
            if self.material.note():
                self.observer.on_message(self.material.note())
            self.observer.on_start([arm.about() for arm in arms], self.material.record)

    def _lines(self, arms: list[Arm]) -> list[Line]:
        """The table; empty on ranks that write no metrics."""
        if not self.ranks.first:
            return []
        return table([(arm.figures(), self.layout.of(arm.name).metrics) for arm in arms])

    def _result(self, arms: list[Arm], complete: bool) -> Result:
        report = self.layout.report
        result = Result(
            folder=self.layout.root,
            complete=complete,
            step=min(arm.step for arm in arms),
            lines=tuple(self._lines(arms)),
            report=report if complete and report.is_file() else None,
        )
        if self.ranks.first:
            self.observer.on_end(result)
        return result


def _recorded(root: Path) -> TrainRun:
    return TrainRun.from_dict(read_json(root / "config.json"), where=str(root / "config.json"))


def _default(name: str) -> Path:
    return Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}"


@contextlib.contextmanager
def _watched(observer: Observer, tensorboard: bool, ranks: Ranks) -> Iterator[Observer]:
    """Who is told: on the first rank the given observer, and TensorBoard where it is wanted and installed."""
    if not ranks.first:
        yield Observer()
        return
    from .tensorboard import TensorBoard, installed

    if not (tensorboard and installed()):
        yield observer
        return
    with contextlib.closing(TensorBoard()) as logs:
        yield Several(observer, logs)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute with so many threads (0 = as many as before), while inside."""
    if not number:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Give the caller's generators back as they were."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
