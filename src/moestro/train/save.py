"""Saving and resuming one model's training: complete or not at all, exact to the last bit.

A save writes a new folder below `state/`, then replaces `manifest.json`: from that moment the new state is the one that
counts. Only then are the best weights and the trace published under their own names (links to the state's files), and
older states removed. Whenever the process dies, the manifest names a complete state; a publication that was missed is
made up on resume, and readers meanwhile find the content in the state (`manifest.resolve`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import UserError
from ..core.files import Seal, seal, sync_folder
from . import manifest as manifests
from .files import read_json, read_tensors, write_json, write_tensors
from .layout import Layout
from .log import Metrics
from .manifest import Manifest

__all__ = ["Saved", "Store", "read_state", "state_of"]

TENSORS = ("model", "optimizer", "rng")
PUBLISHED = {"model.safetensors": "model.safetensors", "trace.safetensors": "trace.safetensors"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """One state. tensors: file (model, optimizer, rng) -> named tensors. progress: a JSON object."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    progress: Mapping[str, Any]


class Store:
    """The files of one run folder (without its twin), used by the first rank only."""

    def __init__(self, layout: Layout, manifest: Manifest | None = None) -> None:
        self.layout = layout
        self.files: dict[str, Seal] = dict(manifest.files) if manifest else {}
        self.step = manifest.step if manifest else 0
        self.complete = manifest.complete if manifest else False
        size = manifest.growing["metrics.jsonl"].bytes if manifest and "metrics.jsonl" in manifest.growing else 0
        self._state = state_of(self.files)
        with self._explained():
            self.metrics = Metrics(layout.metrics, size)

    @classmethod
    def open(cls, layout: Layout) -> Store | None:
        """The store of a run to be resumed: verified whole, left-overs of an interrupted save removed.

        None where a run ended before it wrote its first manifest, and so before its first step.
        """
        if not layout.manifest.exists() and not layout.states.exists():
            return None
        manifest = manifests.read(layout.root)
        manifests.verify(layout.root, manifest)
        store = cls(layout, manifest)
        with store._explained():
            store._publish()
            store._tidy()
        return store

    def put(self, files: Mapping[str, Any]) -> None:
        """Write small JSON files of the run (values) or take note of files already written (None)."""
        with self._explained():
            for name, value in files.items():
                path = self.layout / name
                self.files[name] = seal(path) if value is None else write_json(path, value)

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a row to the metrics."""
        with self._explained():
            self.metrics.add(row)

    def commit(self, complete: bool | None = None) -> None:
        """Replace the manifest: everything put so far counts."""
        self._replace(self.files, self.step, self.complete if complete is None else complete)

    def _replace(self, files: dict[str, Seal], step: int, complete: bool) -> None:
        with self._explained():
            growing = {"metrics.jsonl": self.metrics.seal()}
            for path in sorted((self.layout / "tensorboard").glob("*")):
                growing[f"tensorboard/{path.name}"] = seal(path)
            made = Manifest(step=step, complete=complete, files=files, growing=growing)
            manifests.write(self.layout.root, made)
        self.files, self.step, self.complete, self._state = files, step, complete, state_of(files)

    def save(self, saved: Saved, best: bool, write_trace: Callable[[Path], None] | None = None) -> None:
        """Make `saved` the state that counts; `best`: publish its model. write_trace: writes a trace to a path."""
        name = f"step-{saved.step:08d}"
        if self._state is not None and self._state.startswith(name):
            name = f"{self._state}+"
        fresh, place = self.layout.states / f".{name}.new", self.layout.states / name
        try:
            with self._explained():
                for old in (fresh, place):
                    shutil.rmtree(old, ignore_errors=True)
                fresh.mkdir(parents=True)
                seals = {
                    f"{n}.safetensors": write_tensors(fresh / f"{n}.safetensors", t) for n, t in saved.tensors.items()
                }
                seals["progress.json"] = write_json(fresh / "progress.json", saved.progress)
                if write_trace is not None:
                    write_trace(fresh / "trace.safetensors")
                    seals["trace.safetensors"] = seal(fresh / "trace.safetensors")
                fresh.rename(place)
                sync_folder(self.layout.states)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        files = {n: s for n, s in self.files.items() if not n.startswith("state/")}
        files |= {f"state/{name}/{n}": s for n, s in seals.items()}
        if best:
            files["model.safetensors"] = seals["model.safetensors"]
        if write_trace is not None:
            files["trace.safetensors"] = seals["trace.safetensors"]
        self._replace(files, saved.step, self.complete)
        with self._explained():
            self._publish()
            self._tidy()

    def state_file(self, name: str) -> Path | None:
        """A file of the last state, or None where it has no such file."""
        found = f"state/{self._state}/{name}"
        return self.layout / found if found in self.files else None

    def where(self) -> str:
        """For messages: what can be resumed from."""
        return f"step {self.step} in {self.layout.states}" if self._state else "nothing was saved yet"

    def _publish(self) -> None:
        """Bring published files up to the manifest, from the state that holds their content."""
        for name, inside in PUBLISHED.items():
            source, target = f"state/{self._state}/{inside}", self.layout / name
            if source not in self.files or self.files.get(name) != self.files[source]:
                continue
            if (
                target.is_file()
                and target.stat().st_size == self.files[name].bytes
                and seal(target) == self.files[name]
            ):
                continue
            beside = self.layout / f".{name}.new"
            beside.unlink(missing_ok=True)
            try:
                os.link(self.layout / source, beside)
            except OSError:
                shutil.copyfile(self.layout / source, beside)
            beside.replace(target)
        sync_folder(self.layout.root)

    def _tidy(self) -> None:
        """Remove what no manifest names: older states, and what interrupted saves left."""
        if self.layout.states.is_dir():
            for path in self.layout.states.iterdir():
                if path.name != self._state:
                    shutil.rmtree(path, ignore_errors=True)
        for path in self.layout.root.glob(".*.new"):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Failures of the file system as one line that says what is safe."""
        try:
            yield
        except OSError as error:
            where = error.filename or self.layout.root
            raise UserError(
                f"{os.fsdecode(where)}: cannot be written ({error.strerror or error}); what was saved before is intact "
                f"({self.where()}): free some space or mend the place, then continue with resume"
            ) from error


def read_state(root: Path, manifest: Manifest) -> Saved | None:
    """The last state of a (verified) run, or None where nothing was saved yet."""
    state = state_of(manifest.files)
    if state is None:
        return None
    place = root / "state" / state
    tensors = {n: read_tensors(place / f"{n}.safetensors") for n in TENSORS}
    return Saved(step=manifest.step, tensors=tensors, progress=read_json(place / "progress.json"))


def state_of(files: Mapping[str, Seal]) -> str | None:
    """The name of the state that a manifest lists."""
    return next((name.split("/")[1] for name in files if name.startswith("state/")), None)
