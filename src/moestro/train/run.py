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

from ..core.errors import UserError
from ..tasks.batches import Batches
from ..tasks.config import Corpus as CorpusConfig
from ..tasks.config import Text
from ..tasks.corpus import Corpus, cache_folder, open_corpus, prepare, skipped_line, writable
from ..tasks.labelling import Labels
from ..tasks.source import Source
from ..tasks.tokenizer import Tokenizer
from ..tasks.tokenizer_file import read_tokenizer
from ..trace.record import Recorder
from . import manifest as manifests
from . import settings
from .arm import Arm
from .compare import Line, table
from .config import TrainRun
from .files import read_json
from .layout import Layout, claim, is_run
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
        self.tokenizer, self.corpus = self._text(config, recorded)
        model = config.model.replace(vocab_size=_vocabulary(config, self.tokenizer), seed=config.seed)
        self.config = config.replace(model=model)
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
        self.ranks.together(
            lambda: finish(self.config, self.stores, lines, self.tokenizer, self.corpus, self.command, say)
        )
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
            texts = {"config.json": config.to_dict(), "corpus.json": self.corpus.record}
            store.put({**texts, "tokenizer.json": json.loads(self.tokenizer.to_json())})
            store.commit(complete=store.complete and store.step >= config.steps)

    def _arm(self, name: str, config: TrainRun, layout: Layout) -> Arm:
        labels = Labels(self.corpus, self.tokenizer, config.seq_len)
        store = self.stores.get(layout.root)
        recorder = None
        if store is not None and "moe" in config.model.kinds():
            recorder = self._recorder(config, store, labels)
        batches = Batches(self.corpus, config.seq_len, config.seed)
        arm = Arm(name, config, batches, self.ranks, store, self.observer, recorder, labels)
        saved = read_state(layout.root, manifests.read(layout.root))
        if saved is not None:
            arm.restore(saved, layout.states)
        elif config.start:
            start(arm.model, config.start)
        return arm

    def _recorder(self, config: TrainRun, store: Store, labels: Labels) -> Recorder:
        pieces = None if self.tokenizer.vocab_size == 256 else lambda i: self.tokenizer.decode([i])
        before = store.state_file("trace.safetensors")
        if before is not None:
            return Recorder.resume(before, config.recording, pieces=pieces)
        return Recorder(
            config.recording,
            labels=labels.names,
            tokenizer="bytes" if pieces is None else "tokenizer.json",
            pieces=pieces,
            run={
                "seed": config.seed,
                "steps": config.steps,
                "batch_size": config.batch_size,
                "seq_len": config.seq_len,
            },
            model=config.model.to_dict(),
            data={"title": self.corpus.record["title"], "key": self.corpus.key},
        )

    def _announce(self, arms: list[Arm]) -> None:
        if self.ranks.first:
            record = self.corpus.record
            skipped = skipped_line(record["skipped"])
            if skipped:
                self.observer.on_message(f"{record['title']}: {len(record['files'])} files; left out: {skipped}")
            self.observer.on_start([arm.about() for arm in arms], record)

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

    # Text ---------------------------------------------------------------------------------------------------------

    def _text(self, config: TrainRun, recorded: TrainRun | None) -> tuple[Tokenizer, Corpus]:
        """The tokenizer and the tokenised text; of a resumed run, the same text as before."""
        data, before = config.data, recorded.data if recorded is not None else None
        kept = before is not None and data.tokenizer == before.tokenizer
        tokenizer = read_tokenizer(self.layout.tokenizer if kept else data.tokenizer)
        key = read_json(self.layout.corpus)["key"] if before is not None else None

        def work() -> Corpus:
            folder = cache_folder(data.cache)
            if not data.cache and not writable(folder):
                folder = self.layout / "text"
            if key is not None and data == before:
                with contextlib.suppress(UserError):
                    return open_corpus(folder, key)
            made = prepare(self._source(data), tokenizer, folder, self.observer.on_message)
            if key is not None and made.key != key:
                raise UserError(
                    f"resume: the text of {made.record['title']} is not the one that this run began with; restore it, "
                    "or start a new run in another folder"
                )
            return made

        return tokenizer, self.ranks.by_machine(work)

    def _source(self, data: CorpusConfig) -> Source:
        return data.build(leave_out=is_run) if isinstance(data, Text) else data.build()


def _recorded(root: Path) -> TrainRun:
    return TrainRun.from_dict(read_json(root / "config.json"), where=str(root / "config.json"))


def _vocabulary(config: TrainRun, tokenizer: Tokenizer) -> int:
    """The tokenizer's, or that of the weights to begin with, which may have more places than it uses."""
    if not config.start:
        return tokenizer.vocab_size
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"start: the tokenizer has {tokenizer.vocab_size} ids, the model of {config.start} embeds "
            f"{config.model.vocab_size}; train with the tokenizer of that model"
        )
    return config.model.vocab_size


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
