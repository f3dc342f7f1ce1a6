"""Several products of the same few rows, in one reading of the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import FEW, kernels, ready

__all__ = ["linear", "linears"]


def linears(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> tuple[Tensor, ...] | None:
    """x W_i^T + b_i for each of up to three matrices, or None where it does not apply.

    Shapes: x [..., I] of few rows; weights [O_i, I]; biases [O_i] or None -> [..., O_i] each.
    """
    library = kernels(x)
    if library is None:
        return None
    I = x.shape[-1]
    T = x.numel() // max(I, 1)
    if T > FEW or not T or not ready(x, *weights, *biases) or any(w.shape[1] != I for w in weights):
        return None
    lead = x.shape[:-1]
    out = tuple([torch.empty((*lead, w.shape[0])) for w in weights])
    arguments: list[int | None] = []
    for y, w, b in zip(out, weights, biases):
        arguments += (y.data_ptr(), w.data_ptr(), None if b is None else b.data_ptr(), w.shape[0])
    arguments += (None, None, None, 0) * (3 - len(weights))
    library.moestro_linears(x.data_ptr(), T, I, *arguments, torch.get_num_threads())
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, whatever x is: `linears` where it applies, else `torch.nn.functional.linear`."""
    made = linears(x, (weight,), (bias,))
    return F.linear(x, weight, bias) if made is None else made[0]
