"""TensorBoard logs, where tensorboard is installed: an optional dependency that only this file needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from .observe import Arm, Observer, StepInfo

__all__ = ["TensorBoard", "installed"]

_SHOWN = ("loss", "bits_per_byte", "nats", "grad_norm", "lr", "tokens_per_second", "load_entropy", "max_violation")


def installed() -> bool:
    """Whether tensorboard can be imported."""
    return importlib.util.find_spec("tensorboard") is not None


class TensorBoard(Observer):
    """Writes scalars of every step and evaluation to `tensorboard/` in the run folder of each arm."""

    def __init__(self) -> None:
        self._writers: dict[str, Any] = {}

    def on_start(self, arms: Sequence[Arm], corpus: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        for arm in arms:
            if arm.start < arm.steps:
                folder = str(arm.folder / "tensorboard")
                # What an interrupted run logged after its last save is shown no more.
                self._writers[arm.name] = SummaryWriter(folder, purge_step=arm.start + 1 if arm.start else None)

    def on_step(self, info: StepInfo) -> None:
        writer = self._writers[info.arm]
        for name, value in _scalars(info.row, _SHOWN).items():
            writer.add_scalar(f"train/{name}", value, info.step)
        for name, value in info.row["terms"].items():
            writer.add_scalar(f"terms/{name}", value, info.step)

    def on_eval(self, arm: str, row: Mapping[str, Any]) -> None:
        for name, value in _scalars(row, ("bits_per_byte", "nats", "load_entropy", "routing_entropy")).items():
            self._writers[arm].add_scalar(f"validation/{name}", value, row["step"])

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _scalars(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Those of a row that there are; nats and the task's metrics in place of bits per byte where there are none."""
    left_out = ("nats",) if "bits_per_byte" in row else ()
    found = {name: row[name] for name in names if row.get(name) is not None and name not in left_out}
    return found | dict(row.get("metrics", {}))
