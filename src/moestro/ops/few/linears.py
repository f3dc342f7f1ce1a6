"""Several products of the same rows, in one reading of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import kernels, ready

__all__ = ["SOME", "linear", "linears"]

SOME = 32
"""The most rows for which reading a matrix as it lies beats the library's product, which lays it out anew."""


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
    """x W_i^T + b_i for each of up to three matrices, or None where it does not apply.

    Shapes: x [..., I] of at most SOME rows; weights [O_i, I]; biases [O_i] or None -> [..., O_i] each.
    """
    library = kernels(x)
    if library is None:
        return None
    I = x.shape[-1]
    T = x.numel() // I if I else 0
    if T > SOME or not T or not ready(x, *weights, *biases):
        return None
    lead = x.shape[:-1]
    out: list[Tensor] = []
    arguments: list[int | None] = []
    for w, b in zip(weights, biases):
        rows, width = w.shape
        if width != I or (b is not None and b.shape != (rows,)):
            return None
        y = x.new_empty((*lead, rows))
        out.append(y)
        arguments += (y.data_ptr(), w.data_ptr(), None if b is None else b.data_ptr(), rows)
    arguments += (None, None, None, 0) * (3 - len(weights))
    library.moestro_linears(x.data_ptr(), T, I, *arguments, torch.get_num_threads())
    return tuple(out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, whatever x is: `linears` where it applies, else `torch.nn.functional.linear`."""
    made = linears(x, (weight,), (bias,))
    return F.linear(x, weight, bias) if made is None else made[0]
