"""The grouped product as a loop over rows, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["grouped_linear"]


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """[R, O] float64: each row times its expert's matrix, plus its bias."""
    matrices = weight.double().unbind(0)
    biases = None if bias is None else bias.double().unbind(0)
    bounds = offsets.tolist()
    out: list[Tensor] = [rows.new_zeros(weight.shape[1], dtype=torch.float64)] * rows.shape[0]
    for e in range(weight.shape[0]):
        for r in range(bounds[e], bounds[e + 1]):
            y = matrices[e] @ rows[r].double()
            out[r] = y if biases is None else y + biases[e]
    return torch.stack(out) if out else rows.new_zeros((0, weight.shape[1]), dtype=torch.float64)
