"""The grouped product as one matrix product per expert, written in place. Any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import Spec

__all__ = ["columns", "outer", "products", "supported", "transposed_products"]

NAME = "loop"


def supported(spec: Spec) -> tuple[bool, str]:
    """Always: this is what everything falls back to."""
    return True, "one product per expert"


def products(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """[R, I] x [E, O, I] -> [R, O]. Rows after the last offset come out as zeros."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    bounds = offsets.tolist()
    matrices = weight.transpose(1, 2).unbind(0)
    biases = bias.unbind(0) if bias is not None else None
    for e, matrix in enumerate(matrices):
        start, stop = bounds[e], bounds[e + 1]
        if stop == start:
            continue
        if biases is None:
            torch.mm(rows[start:stop], matrix, out=out[start:stop])
        else:
            torch.addmm(biases[e], rows[start:stop], matrix, out=out[start:stop])
    out[bounds[-1] :].zero_()
    return out


def transposed_products(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[R, O] x [E, O, I] -> [R, I]: the gradient of the rows."""
    return products(grad, weight.transpose(1, 2), offsets)


def outer(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """[R, O] x [R, I] -> [E, O, I]: the gradient of the weights, exact zeros for experts without rows."""
    bounds = offsets.tolist()
    out = grad.new_empty(len(bounds) - 1, grad.shape[1], rows.shape[1])
    for e, matrix in enumerate(out.unbind(0)):
        start, stop = bounds[e], bounds[e + 1]
        if stop == start:
            matrix.zero_()
        else:
            torch.mm(grad[start:stop].t(), rows[start:stop], out=matrix)
    return out


def columns(grad: Tensor, offsets: Tensor) -> Tensor:
    """[R, O] -> [E, O]: the sums of each expert's rows, zeros for experts without rows."""
    bounds = offsets.tolist()
    out = grad.new_zeros(len(bounds) - 1, grad.shape[1])
    for e, total in enumerate(out.unbind(0)):
        if bounds[e + 1] > bounds[e]:
            torch.sum(grad[bounds[e] : bounds[e + 1]], 0, out=total)
    return out
