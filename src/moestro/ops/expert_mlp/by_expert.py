"""Experts one after the other: an expert's hidden values stay in cache between its products. Any device, any dtype.

They are kept transposed, [F, n] for n rows: the halves of gate and up are then contiguous. All pre-activations share
one flat buffer, the only thing saved besides the inputs; the activation is computed again. The gradient of a combine
weight is <h, d_h> before the weight is multiplied in, so expert outputs need not be kept either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..combine.sums import sum_rows
from ..precision import sum_dtype
from .activations import activation_of, lifted
from .problem import Grads, Problem, Spec, Wanted
from .shapes import Groups, blocks

__all__ = ["backward", "forward", "supported"]

NAME = "by_expert"


def supported(spec: Spec) -> tuple[bool, str]:
    """Everything but `deterministic`."""
    if spec.deterministic:
        return False, "torch's products round differently for one row than for many"
    return True, "one expert after the other"


def forward(p: Problem, save: bool) -> tuple[Tensor, Tensor]:
    """y and the pre-activations (of no rows, unless they are saved)."""
    act, groups = activation_of(p.activation, p.clamp), Groups(p.offsets, p.num_rows)
    firsts, seconds = blocks(p.first, p.down, p.widths)
    sizes = _sizes(p, seconds, groups)
    hidden = p.x.new_empty(p.hidden_shape() if save else 0)
    flat = hidden.view(-1)[: sum(sizes)] if save else p.x.new_empty(max(sizes, default=0))
    scratch = p.x.new_empty(_largest(seconds, groups))
    out = p.x.new_empty(p.num_rows, p.x.shape[1])
    outs = groups.split(out)
    rows = _Rows(p.x, p.unit, groups)
    first_bias, down_bias = _each(p.first_bias, groups), _each(p.down_bias, groups)
    start = 0
    for e, (first, second, n) in enumerate(zip(firsts, seconds, groups.counts)):
        if n == 0:
            continue
        F = second.shape[0]
        pre = flat[start : start + sizes[e]].view(-1, n)
        start += sizes[e] if save else 0
        h = scratch[: F * n].view(F, n)
        _affine(first, rows.of(e).t(), first_bias[e], 1, pre)
        act.forward(pre[:F], h)
        if p.gated:
            h.mul_(lifted(pre[F:], p.clamp))
        _affine(h.t(), second, down_bias[e], 0, outs[e])
    groups.tail(out).zero_()
    return (out if p.inverse is None else sum_rows(out, p.weight, p.inverse)), hidden


def backward(p: Problem, hidden: Tensor, grad: Tensor, wanted: Wanted) -> Grads:
    """The gradients that are wanted, from the pre-activations that `forward` saved."""
    act, groups = activation_of(p.activation, p.clamp), Groups(p.offsets, p.num_rows)
    firsts, seconds = blocks(p.first, p.down, p.widths)
    sizes = _sizes(p, seconds, groups)
    grads = _empty(p, wanted)
    d_firsts = [None] * len(firsts) if grads.first is None else blocks(grads.first, p.down, p.widths)[0]
    d_seconds = [None] * len(firsts) if grads.down is None else blocks(p.first, grads.down, p.widths)[1]
    d_first_bias, d_down_bias = _each(grads.first_bias, groups), _each(grads.down_bias, groups)
    down_bias = _each(p.down_bias, groups)
    d_rows = p.x.new_empty(p.num_rows, p.x.shape[1]) if wanted.x else None
    d_row = None if d_rows is None else groups.split(d_rows)
    dots = p.x.new_zeros(p.num_rows, dtype=sum_dtype(p.x.dtype)) if wanted.weight else None
    dot = None if dots is None else groups.split(dots)
    weight = p.row_weights()
    weights = [None] * len(firsts) if weight is None else groups.split(weight)
    buffers = [p.x.new_empty(_largest(seconds, groups)) for _ in range(2)] + [p.x.new_empty(max(sizes, default=0))]
    rows, gradients = _Rows(p.x, p.unit, groups), _Rows(grad, p.unit, groups)
    values = hidden.view(-1)[: sum(sizes)].split(sizes)
    for e, (first, second, n) in enumerate(zip(firsts, seconds, groups.counts)):
        d_first, d_second, w = d_firsts[e], d_seconds[e], weights[e]
        if n == 0:
            for d in (d_first, d_second, d_first_bias[e], d_down_bias[e]):
                if d is not None:
                    d.zero_()
            continue
        F, g = second.shape[0], gradients.of(e)
        pre, d_pre = values[e].view(-1, n), buffers[2][: sizes[e]].view(-1, n)
        h, d_h = (b[: F * n].view(F, n) for b in buffers[:2])
        gate, up = pre[:F], lifted(pre[F:], p.clamp)
        torch.mm(second, g.t(), out=d_h)
        act.forward(gate, h)
        if p.gated:
            torch.mul(d_h, h, out=d_pre[F:])
            h.mul_(up)
        if dot is not None:
            product = torch.mul(d_pre[F:], up, out=d_pre[:F]) if p.gated else torch.mul(d_h, h, out=d_pre)
            torch.sum(product, 0, dtype=dot[e].dtype, out=dot[e])
            if (b2 := down_bias[e]) is not None:
                dot[e].add_(torch.mv(g, b2))
        if p.clamp is not None:
            d_pre[F:].mul_(p.clamp.inside(pre[F:]))
        if d_second is not None:
            torch.mm(h if w is None else h.mul_(w), g, out=d_second)
        _sum_rows_of(g, w, d_down_bias[e])
        act.backward(d_h.mul_(up) if p.gated else d_h, gate, d_pre[:F])
        if w is not None:
            d_pre.mul_(w)
        if d_row is not None:
            torch.mm(d_pre.t(), first, out=d_row[e])
        if d_first is not None:
            torch.mm(d_pre, rows.of(e), out=d_first)
        if d_first_bias[e] is not None:
            torch.sum(d_pre, 1, out=d_first_bias[e])
    d_x = d_rows
    if d_rows is not None:
        groups.tail(d_rows).zero_()
        d_x = d_rows if p.inverse is None else sum_rows(d_rows, None, p.inverse)
    return grads._replace(x=d_x, weight=None if dots is None else table_of(p, dots))


def table_of(p: Problem, dots: Tensor) -> Tensor:
    """[T, K] in the dtype of the weights: a value per row at the place of its choice, zeros elsewhere."""
    assert p.weight is not None
    table = torch.zeros(p.weight.shape, dtype=p.weight.dtype, device=dots.device)
    table.view(-1).index_copy_(0, p.places(), dots.to(table.dtype))
    return table


class _Rows:
    """The rows of each expert: views of rows that are sorted already, or gathered into one buffer, one at a time."""

    def __init__(self, x: Tensor, unit: Tensor | None, groups: Groups) -> None:
        self.x = x
        self.parts = groups.split(x if unit is None else unit)
        self.buffer = None if unit is None else x.new_empty(max(groups.counts, default=0), x.shape[1])

    def of(self, e: int) -> Tensor:
        """[n, D], valid until the next call."""
        part = self.parts[e]
        if self.buffer is None:
            return part
        return torch.index_select(self.x, 0, part, out=self.buffer[: part.shape[0]])


def _sizes(p: Problem, seconds: Sequence[Tensor], groups: Groups) -> list[int]:
    tall = 2 if p.gated else 1
    return [tall * w.shape[0] * n for w, n in zip(seconds, groups.counts)]


def _largest(seconds: Sequence[Tensor], groups: Groups) -> int:
    return max((w.shape[0] * n for w, n in zip(seconds, groups.counts)), default=0)


def _each(stacked: Tensor | None, groups: Groups) -> Sequence[Tensor | None]:
    return [None] * len(groups.counts) if stacked is None else stacked.unbind(0)


def _empty(p: Problem, wanted: Wanted) -> Grads:
    """Gradients of the parameters, to be filled."""

    def like(tensor: Tensor | None, asked: bool) -> Tensor | None:
        if tensor is None or not asked:
            return None
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return Grads(
        first=like(p.first, wanted.first),
        down=like(p.down, wanted.down),
        first_bias=like(p.first_bias, wanted.first_bias),
        down_bias=like(p.down_bias, wanted.down_bias),
    )


def _affine(a: Tensor, b: Tensor, bias: Tensor | None, axis: int, out: Tensor) -> None:
    """a @ b, plus a bias that varies along rows (axis 0: one entry per column) or columns (axis 1)."""
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias[:, None] if axis else bias, a, b, out=out)


def _sum_rows_of(g: Tensor, w: Tensor | None, out: Tensor | None) -> None:
    if out is None:
        return
    if w is None:
        torch.sum(g, 0, out=out)
    else:
        dtype = torch.promote_types(g.dtype, w.dtype)
        out.copy_(torch.mv(g.t().to(dtype), w.to(dtype)))
