"""Sums over a unit's rows in a fixed order, without autograd. Rows are matrices [R, D] here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import sum_dtype

__all__ = ["row_dots", "scaled_rows", "sum_rows"]


def sum_rows(out: Tensor, weight: Tensor | None, inverse: Tensor) -> Tensor:
    """[T, D]: sum over k of weight[t, k] * out[inverse[t, k]], k = 0..K-1; weight None = 1; -1 adds nothing."""
    T, K = inverse.shape
    dtype = sum_dtype(out.dtype)
    full = out.shape[0] == T * K  # every choice has a row
    total = torch.zeros(T, out.shape[1], dtype=dtype, device=out.device)
    if out.shape[0] == 0:
        return total.to(out.dtype)
    for k in range(K):
        rows = out.index_select(0, inverse[:, k].clamp_min(0)).to(dtype)
        if not full:
            rows = rows.masked_fill(inverse[:, k, None] < 0, 0)
        if weight is None:
            total += rows
        else:
            w = weight[:, k, None].to(dtype)
            total.addcmul_(rows, w if full else w.masked_fill(inverse[:, k, None] < 0, 0))
    return total.to(out.dtype)


def scaled_rows(grad: Tensor, unit: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, D]: weight[r] * grad[unit[r]], computed in the summing dtype, returned in `dtype`."""
    rows = grad.index_select(0, unit).to(sum_dtype(dtype))
    return rows.mul_(weight[:, None]).to(dtype)


def row_dots(out: Tensor, grad: Tensor, unit: Tensor) -> Tensor:
    """[R]: the inner products of out[r] and grad[unit[r]]."""
    dtype = sum_dtype(out.dtype)
    return (out.to(dtype) * grad.index_select(0, unit).to(dtype)).sum(-1)
