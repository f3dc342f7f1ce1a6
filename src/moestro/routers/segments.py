"""Means over the units of a segment, the same bits in every run: sums go by sorted stretches, never by scattering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["segment_mean"]


def segment_mean(values: Tensor, segment: Tensor, valid: Tensor | None = None) -> Tensor:
    """Every unit gets the mean of the valid units of its segment; 0 where there is none.

    Shapes: values [T, C]; segment [T] int64, any numbers in any order; valid [T] bool -> [T, C]. What invalid units
    hold has no influence. Shapes do not depend on the numbers.
    """
    order = torch.sort(segment, stable=True).indices
    ascending = segment[order]
    new = torch.cat((torch.ones_like(ascending[:1], dtype=torch.bool), ascending[1:] != ascending[:-1]))
    place = new.cumsum(0) - 1
    lengths = torch.zeros_like(place).scatter_add_(0, place, torch.ones_like(place))
    of = torch.empty_like(place).scatter_(0, order, place)
    kept = torch.ones_like(segment, dtype=torch.bool) if valid is None else valid
    return _Mean.apply(values, kept, order, lengths, of)  # type: ignore[return-value]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, kept: Tensor, order: Tensor, lengths: Tensor, of: Tensor) -> Tensor:
        count = _sums(kept.to(values.dtype)[:, None], order, lengths).clamp_min(1)
        ctx.save_for_backward(kept, order, lengths, of, count)
        sums = _sums(torch.where(kept[:, None], values, 0.0), order, lengths)
        return (sums / count)[of]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, order, lengths, of, count = ctx.saved_tensors
        sums = _sums(grads[0], order, lengths) / count
        return torch.where(kept[:, None], sums[of], 0.0), None, None, None, None


def _sums(values: Tensor, order: Tensor, lengths: Tensor) -> Tensor:
    """[T, C] sums of the segments, in ascending order, then zeros."""
    return torch.segment_reduce(values[order], "sum", lengths=lengths, axis=0, initial=0, unsafe=True)
