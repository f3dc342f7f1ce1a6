"""What a grouped product is asked for, as backends see it when they say whether they can."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Spec"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """rows R, inputs I, outputs O, experts E; the type of the device.

    capability: of a CUDA device. compiling: whether torch.compile is tracing.
    """

    device: str
    dtype: torch.dtype
    rows: int
    inputs: int
    outputs: int
    experts: int
    capability: tuple[int, int] = (0, 0)
    compiling: bool = False

    @staticmethod
    def of(rows: Tensor, weight: Tensor) -> Spec:
        """The spec of rows [R, I] times weight [E, O, I]."""
        cuda = rows.device.type == "cuda"
        return Spec(
            device=rows.device.type,
            dtype=rows.dtype,
            rows=rows.shape[0],
            inputs=weight.shape[2],
            outputs=weight.shape[1],
            experts=weight.shape[0],
            capability=torch.cuda.get_device_capability(rows.device) if cuda else (0, 0),
            compiling=torch.compiler.is_compiling(),
        )

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")
