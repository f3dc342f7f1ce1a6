"""TensorBoard logs, where tensorboard is installed: an optional dependency that only this file needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from .observe import Arm, Observer, StepInfo

__all__ = ["TensorBoard", "installed"]

_SHOWN = ("loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_second", "load_entropy", "max_violation")


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
        for name in _SHOWN:
            if info.row[name] is not None:
                writer.add_scalar(f"train/{name}", info.row[name], info.step)
        for name, value in info.row["terms"].items():
            writer.add_scalar(f"terms/{name}", value, info.step)

    def on_eval(self, arm: str, row: Mapping[str, Any]) -> None:
        for name in ("bits_per_byte", "load_entropy", "routing_entropy"):
            if row[name] is not None:
                self._writers[arm].add_scalar(f"validation/{name}", row[name], row["step"])

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
