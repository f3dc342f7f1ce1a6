"""Grouped products around a module's own gate, on the CPU, with as little around the products as can be.

One operation gathers the rows and takes them through the first stack, one takes them through the second and combines
them; each visits only the experts that have rows. What is fixed per call is then less than in transformers' own
grouped products, and gradients of the stacks are written once, into fresh large pages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.combine.sums import row_dots, scaled_rows, sum_rows
from ...ops.expert_mlp import FEW
from ...ops.pages import large_pages
from ...ops.precision import autocast_off, operands
from ...ops.rows.host import choices
from .recognise import Layout

__all__ = ["grouped"]


class _Listed:
    """A few choices as they come, one row each, all of experts that are here: nothing is sorted."""

    def __init__(self, table: list[int], T: int, K: int) -> None:
        self.experts, self.counts, self.table = table, [1] * len(table), (T, K)

    def gather(self, x: Tensor) -> Tensor:
        return x[:, None].expand(*self.table, x.shape[1]).reshape(-1, x.shape[1])

    def sum(self, rows: Tensor) -> Tensor:
        return self._by_unit(rows).sum(1)

    def combine(self, out: Tensor, weight: Tensor) -> Tensor:
        return (self._by_unit(out) * weight[:, :, None]).sum(1).to(out.dtype)

    def scaled(self, grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return (grad[:, None] * weight[:, :, None]).view(-1, grad.shape[1]).to(dtype)

    def dots(self, out: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        return (self._by_unit(out) * grad[:, None]).sum(2, dtype=weight.dtype)

    def sums(self, grad: Tensor, num_experts: int) -> Tensor:
        out = grad.new_zeros(num_experts, grad.shape[1])
        for row, e in zip(grad.unbind(0), self.experts):
            out.select(0, e).add_(row)
        return out

    def _by_unit(self, rows: Tensor) -> Tensor:
        return rows.view(*self.table, rows.shape[1])


class _Sorted:
    """The choices of experts that are here, sorted by expert, then unit."""

    def __init__(self, expert: Tensor, num_experts: int) -> None:
        found = choices(expert.contiguous(), None, None, num_experts, False)
        self.unit, _, _, offsets, self.inverse, self.place = found
        bounds = offsets.tolist()
        self.experts = [e for e in range(num_experts) if bounds[e + 1] > bounds[e]]
        self.counts = [bounds[e + 1] - bounds[e] for e in self.experts]

    def gather(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.unit)

    def sum(self, rows: Tensor) -> Tensor:
        return sum_rows(rows, None, self.inverse)

    def combine(self, out: Tensor, weight: Tensor) -> Tensor:
        return sum_rows(out, weight, self.inverse)

    def scaled(self, grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return scaled_rows(grad, self.unit, weight.reshape(-1).index_select(0, self.place), dtype)

    def dots(self, out: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        found = weight.new_zeros(weight.shape)
        found.view(-1).index_copy_(0, self.place, row_dots(out, grad, self.unit).to(weight.dtype))
        return found

    def sums(self, grad: Tensor, num_experts: int) -> Tensor:
        out = grad.new_zeros(num_experts, grad.shape[1])
        for e, rows in zip(self.experts, _split(grad, self)):
            torch.sum(rows, 0, out=out.select(0, e))
        return out


_Index = _Listed | _Sorted


def grouped(
    module: Any,
    layout: Layout,
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    first: Tensor,
    down: Tensor,
    first_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """The weighted sum of every unit's experts, with the module's own gate, activation and norm; differentiable.

    Shapes: x [T, D], expert [T, K] int64, weight [T, K], stacks as `layout` says, all on the CPU -> [T, D]. Choices
    outside 0..num_experts-1 add nothing.
    """
    index = _index(expert, module.num_experts)
    turned = layout.is_transposed
    x, first, first_bias = operands("experts", x, first, first_bias)
    pre: Any = _First.apply(x, first, first_bias, index, turned)
    h = module._apply_gate(pre) if layout.has_gate else module.act_fn(pre)
    h, down, down_bias = operands("experts", h, down, down_bias)
    if not layout.has_post_expert_norm:
        return _Second.apply(h, down, down_bias, weight, index, turned)  # type: ignore[return-value]
    out = module.post_expert_norm(_Second.apply(h, down, down_bias, None, index, turned))
    return _Combine.apply(out, weight, index)  # type: ignore[return-value]


def _index(expert: Tensor, num_experts: int) -> _Index:
    if 0 < expert.numel() <= FEW:
        table = expert.reshape(-1).tolist()
        if min(table) >= 0 and max(table) < num_experts:
            return _Listed(table, *expert.shape)
    return _Sorted(expert, num_experts)


class _First(torch.autograd.Function):
    """x [T, D] -> [R, O]: each row's unit times the matrix of its expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Tensor, bias: Tensor | None, index: _Index, turned: bool) -> Tensor:
        rows = index.gather(x)
        ctx.save_for_backward(rows, stack)
        ctx.index, ctx.turned = index, turned
        with autocast_off(x.device):
            return _products(rows, stack, bias, index, turned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, d_stack, d_bias = _gradients(ctx, grads[0].contiguous(), *ctx.saved_tensors)
        return None if d_rows is None else ctx.index.sum(d_rows), d_stack, d_bias, None, None


class _Second(torch.autograd.Function):
    """h [R, F] -> [T, D]: each row times the matrix of its expert, combined; without weights, [R, D]."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, stack: Tensor, bias: Tensor | None, weight: Tensor | None, index: _Index, turned: bool
    ) -> Tensor:
        ctx.index, ctx.turned = index, turned
        with autocast_off(h.device):
            out = _products(h, stack, bias, index, turned)
        ctx.save_for_backward(h, stack, None if weight is None else out, weight)
        return out if weight is None else index.combine(out, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, stack, out, weight = ctx.saved_tensors
        grad, d_weight = grads[0].contiguous(), None
        if weight is not None:
            if ctx.needs_input_grad[3]:
                d_weight = ctx.index.dots(out, grad, weight)
            grad = ctx.index.scaled(grad, weight, out.dtype)
        return *_gradients(ctx, grad, h, stack), d_weight, None, None


class _Combine(torch.autograd.Function):
    """[R, D] -> [T, D]: the weighted sum of every unit's rows."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, weight: Tensor, index: _Index) -> Tensor:
        out = out.contiguous()
        ctx.save_for_backward(out, weight)
        ctx.index = index
        return index.combine(out, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, weight = ctx.saved_tensors
        grad, index = grads[0].contiguous(), ctx.index
        d_out = index.scaled(grad, weight, out.dtype) if ctx.needs_input_grad[0] else None
        return d_out, index.dots(out, grad, weight) if ctx.needs_input_grad[1] else None, None


def _gradients(ctx: Any, grad: Tensor, rows: Tensor, stack: Tensor) -> tuple[Tensor | None, ...]:
    """Of the rows, of the stack in its own layout, and of the biases."""
    index, turned = ctx.index, ctx.turned
    d_rows = d_stack = d_bias = None
    with autocast_off(rows.device):
        if ctx.needs_input_grad[0]:
            d_rows = _products(grad, stack, None, index, not turned)
        if ctx.needs_input_grad[1]:
            d_stack = _outer(*((rows, grad) if turned else (grad, rows)), index, stack)
        if ctx.needs_input_grad[2]:
            d_bias = index.sums(grad, stack.shape[0])
    return d_rows, d_stack, d_bias


def _products(rows: Tensor, stack: Tensor, bias: Tensor | None, index: _Index, turned: bool) -> Tensor:
    """[R, I] x [E, I, O] (not turned: [E, O, I]) -> [R, O]."""
    matrices = stack if turned else stack.transpose(1, 2)
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    each = zip(_chosen(matrices, index), _split(rows, index), _split(out, index))
    if bias is None:
        for matrix, part, result in each:
            torch.mm(part, matrix, out=result)
    else:
        for offset, (matrix, part, result) in zip(_chosen(bias, index), each):
            torch.addmm(offset, part, matrix, out=result)
    return out


def _outer(a: Tensor, b: Tensor, index: _Index, stack: Tensor) -> Tensor:
    """[R, I] x [R, O] -> [E, I, O], the shape of `stack`; exact zeros for experts without rows."""
    out = large_pages(torch.empty_like(stack, memory_format=torch.contiguous_format), fresh=True)
    begun: set[int] = set()
    for e, result, left, right in zip(index.experts, _chosen(out, index), _split(a, index), _split(b, index)):
        if e in begun:
            result.addmm_(left.t(), right)
        else:
            torch.mm(left.t(), right, out=result)
            begun.add(e)
    start = 0
    for e in (*sorted(begun), out.shape[0]):
        if e > start:
            out[start:e].zero_()
        start = e + 1
    return out


def _split(rows: Tensor, index: _Index) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(rows, index.counts) if index.counts else ()


def _chosen(stack: Tensor, index: _Index) -> list[Tensor]:
    """The entry of each expert, for those that have rows."""
    if 4 * len(index.experts) < stack.shape[0]:
        return [stack.select(0, e) for e in index.experts]
    every = stack.unbind(0)
    return [every[e] for e in index.experts]
