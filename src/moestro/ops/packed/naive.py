"""Packed experts row by row: the packed weights as numbers, then float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..expert_mlp.naive import activate
from .format import Packed, unpack

__all__ = ["few", "packed_few"]


def few(
    x: Tensor, expert: Tensor, weight: Tensor, first: Tensor, down: Tensor, activation: str, gated: bool = True
) -> Tensor:
    """[T, D] float64: the weighted sum of each unit's experts. Ids outside 0..E-1 add nothing."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for k in range(expert.shape[1]):
            e = int(expert[t, k])
            if 0 <= e < down.shape[0]:
                h = first[e].double() @ x[t].double()
                gate, up = h.chunk(2) if gated else (h, None)
                h = activate(gate, activation)
                y[t] += weight[t, k].double() * (down[e].double() @ (h if up is None else h * up))
    return y


def packed_few(
    x: Tensor, expert: Tensor, weight: Tensor, first: Packed, down: Packed, activation: str, gated: bool = True
) -> Tensor:
    """The same of packed weights, as the numbers that they stand for."""
    return few(x, expert, weight, unpack(first), unpack(down), activation, gated)
