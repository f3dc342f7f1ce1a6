"""What lies where in a run folder.

    config.json            the TrainRun, as `TrainRun.from_dict` reads it
    corpus.json            the text: every file with its SHA-256, the split, what was left out, sizes; or the examples
    tokenizer.json         the tokenizer, as `tasks.tokenizer.read_tokenizer` reads it; of examples their vocabulary,
                           as `tasks.vocabulary_file.read_vocabulary` does
    metrics.jsonl          one JSON object per line, see below
    model.safetensors      the parameters (and router state) that were best in validation
    state/step-00000100/   the last state, complete: model.safetensors, optimizer.safetensors, rng.safetensors,
                           progress.json; an older one is removed after a newer one is complete
    trace.safetensors      the routing of some held-out text by the best model
    adapter/               of runs with adapters: these alone, best in validation (see `adapters.export`)
    report.html            pictures and tables, self-contained
    summary.json           the final table
    tensorboard/           event files, where tensorboard is installed
    manifest.json          size and SHA-256 of every file above; it is replaced in one piece and decides what counts
    dense/                 the dense twin: again a run folder, with its own manifest
    text/                  the tokenised text, only where the cache folder cannot be written

A state counts once `manifest.json` names it. Files that grow (metrics, event files) are listed with the size and
SHA-256 of the part that belongs to the named state; what stands after it is cut when the run is resumed.

Rows of `metrics.jsonl`; `step` is the number of optimiser steps taken so far and `seconds` the training time, without
evaluation and saving:
    {"kind": "step", step, seconds, loss, nats, bits_per_byte, grad_norm, lr, tokens, text_bytes, tokens_per_second,
     terms: {loss name: mean value over layers}, load_entropy, max_violation}
    {"kind": "eval", step, seconds, nats, bits_per_byte, tokens, best, load_entropy, routing_entropy,
     layers: {path: {load: [E], load_entropy, max_violation, routing_entropy}}}
    {"kind": "starved", step, path, experts: [..]}    experts without a token for long
Runs on examples have `metrics` (accuracy and the like, by name) in place of bits_per_byte, and `targets` in place of
text_bytes. Nats are per target (token, class, span, pair); those of evaluations are without label smoothing.
loss = nats + sum of coefficient * balance loss, in nats per token. load_entropy: entropy of the shares of choices that
the experts get, divided by log E: 1 = even, mean over layers. routing_entropy: mean entropy of the routers'
distributions in nats. max_violation: largest load over the mean load, minus 1.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..core.errors import UserError

__all__ = ["OURS", "TWIN", "Layout", "claim", "is_run"]

TWIN = "dense"
OURS = (
    *("config.json", "corpus.json", "tokenizer.json", "metrics.jsonl", "model.safetensors", "state"),
    *("trace.safetensors", "adapter", "report.html", "summary.json", "tensorboard", "manifest.json", TWIN, "text"),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The paths of one run folder."""

    root: Path

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def corpus(self) -> Path:
        return self.root / "corpus.json"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.root / "model.safetensors"

    @property
    def states(self) -> Path:
        return self.root / "state"

    @property
    def trace(self) -> Path:
        return self.root / "trace.safetensors"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def twin(self) -> Layout:
        return Layout(self.root / TWIN)

    def of(self, arm: str) -> Layout:
        """The run folder of an arm, by its name."""
        return self.twin if arm == TWIN else self


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run (or the beginning of one): a config.json that says so."""
    try:
        with (folder / "config.json").open("rb") as file:
            return b'"train.TrainRun"' in file.read(200)
    except OSError:
        return False


def claim(root: Path, resume: bool) -> Layout:
    """Make the run folder. Raises `UserError` where it cannot be made or holds a run already."""
    layout = Layout(root)
    try:
        taken = [name for name in OURS if (root / name).exists()] if root.is_dir() else []
        if taken and not resume:
            raise UserError(
                f"{root}: holds a run already ({', '.join(taken[:3])}); continue it with resume, or choose another "
                "folder"
            )
        empty = root.is_dir() and not any(p.name != ".probe" for p in root.iterdir())  # killed as it was made
        if resume and not taken and not empty:
            raise UserError(f"{root}: holds no run to resume; check the path, or start one without resume")
        root.mkdir(parents=True, exist_ok=True)
        probe = root / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{root}: a run cannot be written there ({error.strerror}); choose another folder with out"
        ) from error
    return layout
