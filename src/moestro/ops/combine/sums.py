"""Sums over a unit's rows in a fixed order, without autograd. Rows are matrices [R, D] here.

On the CPU, fp32 and float64 go through torch's embedding bag: one pass that reads each row once, adds the rows of a
bag in the order of its indices and writes only the result. Measured for T 4096, K 2, D 128: 0.06 ms against 0.15 ms for
index_select with addcmul per column, and 1.3 ms and more for what builds a [T, K, D] tensor.

Which way is taken depends on how many rows there are. A compiler, that may not know the number, sees registered ops.
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
    return _SUM(out, weight, inverse) if torch.compiler.is_compiling() else _sum_rows(out, weight, inverse)


def scaled_rows(grad: Tensor, unit: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, D]: weight[r] * grad[unit[r]], computed in the summing dtype, returned in `dtype`."""
    made = _SCALED if torch.compiler.is_compiling() else _scaled_rows
    return made(grad, unit, weight, dtype)


def row_dots(out: Tensor, grad: Tensor, unit: Tensor) -> Tensor:
    """[R]: the inner products of out[r] and grad[unit[r]]."""
    return _DOTS(out, grad, unit) if torch.compiler.is_compiling() else _row_dots(out, grad, unit)


def _sum_rows(out: Tensor, weight: Tensor | None, inverse: Tensor) -> Tensor:
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


def _scaled_rows(grad: Tensor, unit: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == grad.dtype and _bags(grad, weight):
        return embedding_bag(unit[:, None], grad, mode="sum", per_sample_weights=weight[:, None])
    rows = grad.index_select(0, unit).to(sum_dtype(dtype))
    return rows.mul_(weight[:, None]).to(dtype)


def _row_dots(out: Tensor, grad: Tensor, unit: Tensor) -> Tensor:
    if _bags(out, grad):
        number = torch.arange(out.shape[0])
        # The gradient that an embedding bag gives its weights: the same products without a [R, D] temporary.
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, out, number, number, unit, 0)
    dtype = sum_dtype(out.dtype)
    return (out.to(dtype) * grad.index_select(0, unit).to(dtype)).sum(-1)


_LIBRARY = torch.library.Library("moestro", "FRAGMENT")
_LIBRARY.define("sum_rows(Tensor out, Tensor? weight, Tensor inverse) -> Tensor")
_LIBRARY.define("scaled_rows(Tensor grad, Tensor unit, Tensor weight, ScalarType dtype) -> Tensor")
_LIBRARY.define("row_dots(Tensor out, Tensor grad, Tensor unit) -> Tensor")
_LIBRARY.impl("sum_rows", _sum_rows, "CompositeExplicitAutograd")
_LIBRARY.impl("scaled_rows", _scaled_rows, "CompositeExplicitAutograd")
_LIBRARY.impl("row_dots", _row_dots, "CompositeExplicitAutograd")
_SUM = torch.ops.moestro.sum_rows.default
_SCALED = torch.ops.moestro.scaled_rows.default
_DOTS = torch.ops.moestro.row_dots.default


@torch.library.register_fake("moestro::sum_rows")
def _(out: Tensor, weight: Tensor | None, inverse: Tensor) -> Tensor:
    return out.new_empty(inverse.shape[0], out.shape[1])


@torch.library.register_fake("moestro::scaled_rows")
def _(grad: Tensor, unit: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(unit.shape[0], grad.shape[1], dtype=dtype)


@torch.library.register_fake("moestro::row_dots")
def _(out: Tensor, grad: Tensor, unit: Tensor) -> Tensor:
    return out.new_empty(unit.shape[0], dtype=sum_dtype(out.dtype))
