"""Ordering by value with ties to the lower index: `torch.topk` promises no order among equals."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["descending", "highest"]


def highest(value: Tensor, k: int) -> Tensor:
    """[T, k] int64: indices of the k highest of each row, highest first; equal values (0 and -0 too) by lower index.

    Shapes: value [T, E] fp32 or fp64, 0 <= k <= E. NaN ranks above everything, -inf no higher than any finite number.
    """
    assert k <= value.shape[1]
    value = value.detach()
    if k == 0:
        return value.new_empty((value.shape[0], 0), dtype=torch.int64)
    if value.shape[0] == 1 and value.shape[1] <= 64 and (order := _one_row(value)) is not None:
        return torch.tensor([order[:k]])
    if k == 1:
        return value.argmax(dim=1, keepdim=True)
    if k <= (3 if value.shape[1] < 32 else 8):  # where repeated argmax is the fastest exact way on a CPU
        return _rounds(value, k)
    if value.dtype == torch.float32:
        return _by_key(value, k)
    return descending(value)[:, :k]


def descending(value: Tensor) -> Tensor:
    """[T, E] int64: the stable descending order of each row."""
    return torch.sort(value.detach(), dim=1, descending=True, stable=True).indices


def _one_row(value: Tensor) -> list[int] | None:
    """The order of one decoded token, in Python: a third of the time of k rounds. None where a NaN would confuse it,
    or where somebody traces or the numbers are elsewhere."""
    if type(value) is not Tensor or not value.is_cpu or torch.compiler.is_compiling():
        return None
    row = value[0].tolist()
    total = sum(row)
    if total != total:
        return None
    return sorted(range(len(row)), key=row.__getitem__, reverse=True)  # stable: equal ones stay in their order


def _rounds(value: Tensor, k: int) -> Tensor:
    """argmax returns the first of several maxima; what is taken sinks below every finite value and cannot return."""
    value = value.clamp(min=torch.finfo(value.dtype).min)  # a copy: what follows writes into it
    taken: list[Tensor] = []
    for _ in range(k):
        taken.append(value.argmax(dim=1, keepdim=True))
        if len(taken) < k:
            value.scatter_(1, taken[-1], float("-inf"))
    return torch.cat(taken, dim=1)


def _by_key(value: Tensor, k: int) -> Tensor:
    """Distinct integer keys: the float's bits as an ordered integer above, the reversed index below."""
    E = value.shape[1]
    bits = (value + 0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    index = torch.arange(E - 1, -1, -1, device=value.device)
    best = torch.topk((bits.to(torch.int64) << 32) | index, k, dim=1).values
    return E - 1 - (best & 0xFFFFFFFF)
