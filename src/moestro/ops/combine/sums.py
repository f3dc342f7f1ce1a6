"""Sums over a unit's rows in a fixed order, without autograd. Rows are matrices [R, D] here.

On the CPU, fp32 and float64 go through torch's embedding bag: one pass that reads each row once, adds the rows of a
bag in the order of its indices and writes only the result. Measured for T 4096, K 2, D 128: 0.06 ms against 0.15 ms for
index_select with addcmul per column, and 1.3 ms and more for what builds a [T, K, D] tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..precision import sum_dtype

__all__ = ["row_dots", "scaled_rows", "sum_rows"]


def _bags(table: Tensor, *others: Tensor | None) -> bool:
    """Whether the embedding bag can be used: it wants one dtype throughout, and rows of at least one entry."""
    if table.device.type != "cpu" or table.dtype not in (torch.float32, torch.float64) or table.numel() == 0:
        return False
    return all(t is None or t.dtype == table.dtype for t in others)


def sum_rows(out: Tensor, weight: Tensor | None, inverse: Tensor) -> Tensor:
    """[T, D]: sum over k of weight[t, k] * out[inverse[t, k]], k = 0..K-1; weight None = 1; -1 adds nothing."""
    T, K = inverse.shape
    out = out.detach()
    weight = weight if weight is None else weight.detach().contiguous()
    if out.shape[0] == 0:
        return out.new_zeros(T, out.shape[1])
    full = out.shape[0] == T * K  # every choice has a row
    if _bags(out, weight) and full:
        return embedding_bag(inverse, out, mode="sum", per_sample_weights=weight)
    if _bags(out, weight):
        # Absent choices are left out rather than multiplied by zero: what they would point at may not be finite.
        there = inverse >= 0
        ends = there.sum(1).cumsum(0)
        weights = weight if weight is None else weight.masked_select(there)
        return embedding_bag(
            inverse.masked_select(there),
            out,
            torch.cat([ends.new_zeros(1), ends]),
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )
    return _by_column(out, weight, inverse, full)


def _by_column(out: Tensor, weight: Tensor | None, inverse: Tensor, full: bool) -> Tensor:
    dtype = sum_dtype(out.dtype)
    total = torch.zeros(inverse.shape[0], out.shape[1], dtype=dtype, device=out.device)
    for column, number in enumerate(inverse.unbind(1)):
        rows = out.index_select(0, number if full else number.clamp_min(0)).to(dtype)
        if not full:
            rows.masked_fill_(number[:, None] < 0, 0)
        if weight is None:
            total.add_(rows)
        elif full:
            total.addcmul_(rows, weight[:, column, None].to(dtype))
        else:
            total.addcmul_(rows, weight[:, column, None].to(dtype).masked_fill(number[:, None] < 0, 0))
    return total.to(out.dtype)


def scaled_rows(grad: Tensor, unit: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, D]: weight[r] * grad[unit[r]], computed in the summing dtype, returned in `dtype`."""
    if dtype == grad.dtype and _bags(grad, weight):
        return embedding_bag(unit[:, None], grad, mode="sum", per_sample_weights=weight[:, None])
    rows = grad.index_select(0, unit).to(sum_dtype(dtype))
    return rows.mul_(weight[:, None]).to(dtype)


def row_dots(out: Tensor, grad: Tensor, unit: Tensor) -> Tensor:
    """[R]: the inner products of out[r] and grad[unit[r]]."""
    if _bags(out, grad):
        number = torch.arange(out.shape[0])
        # The gradient that an embedding bag gives its weights: the same products without a [R, D] temporary.
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, out, number, number, unit, 0)
    dtype = sum_dtype(out.dtype)
    return (out.to(dtype) * grad.index_select(0, unit).to(dtype)).sum(-1)
