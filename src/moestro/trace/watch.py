"""The watch for silent experts: names an expert that no token chose for many training steps, while the run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..core.errors import UserError
from .metrics import Silent
from .tables import Array

__all__ = ["Watch"]


class Watch:
    """Counts, per expert, the training steps since it was last chosen. Its state is a small JSON-able dict."""

    def __init__(self, patience: int = 100) -> None:
        if patience < 1:
            raise UserError(f"Watch: patience must be at least 1 step, not {patience}")
        self.patience = patience
        self._idle: dict[str, Array] = {}

    def step(self, counts: Mapping[str, Any]) -> list[Silent]:
        """One optimiser step's counts, path -> [E] (tensor or array); the experts silent for exactly `patience` steps.

        An expert is named once per silence: the trainer logs what is returned.
        """
        out: list[Silent] = []
        for path, values in counts.items():
            chosen = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values) > 0
            idle = self._idle.get(path)
            idle = np.zeros(len(chosen), np.int64) if idle is None or len(idle) != len(chosen) else idle
            self._idle[path] = np.where(chosen, 0, idle + 1)
            out += [Silent(path, int(e), self.patience) for e in np.flatnonzero(self._idle[path] == self.patience)]
        return out

    def silent(self) -> list[Silent]:
        """All experts that are silent now, with the number of steps."""
        return [
            Silent(path, int(e), int(idle[e]))
            for path, idle in self._idle.items()
            for e in np.flatnonzero(idle >= self.patience)
        ]

    def to_dict(self) -> dict[str, Any]:
        return {"patience": self.patience, "idle": {path: idle.tolist() for path, idle in self._idle.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Watch:
        made = cls(int(data["patience"]))
        made._idle = {str(path): np.asarray(idle, np.int64) for path, idle in data["idle"].items()}
        return made
