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
from ...ops.grouped import Spec, choose, fused, native
from ...ops.grouped.choose import Backend
from ...ops.pages import LARGE, large_pages
from ...ops.precision import autocast_off, operands, sum_dtype
from ...ops.rows.host import choices
from .recognise import Layout

__all__ = ["grouped"]

MANY = 8  # experts with rows, from which torch's call for all of them is shorter than a call for each
SHORT = 1024  # choices up to which torch sorts sooner than numpy has been called


class _Listed:
    """A few choices as they come, one row each, all of experts that are here: nothing is sorted."""

    def __init__(self, expert: Tensor, experts: list[int]) -> None:
        self.expert, self.experts, self.counts, self.table = (
            expert.reshape(-1),
            experts,
            [1] * len(experts),
            expert.shape,
        )

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

    def _by_unit(self, rows: Tensor) -> Tensor:
        return rows.view(*self.table, rows.shape[1])


class _Sorted:
    """The choices of experts that are here, sorted by expert, then unit."""

    def __init__(self, expert: Tensor, num_experts: int) -> None:
        table = expert.reshape(-1)
        short = 0 < table.numel() <= SHORT
        if short:
            self.expert, self.place = table.sort(stable=True)
        if short and int(self.expert[0]) >= 0 and int(self.expert[-1]) < num_experts:
            self.unit = self.place // expert.shape[1]
            inverse = torch.empty_like(self.place).scatter_(0, self.place, torch.arange(table.numel()))
            self.inverse = inverse.view(expert.shape)
            counts = torch.bincount(table, minlength=num_experts)
            self.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            counts = counts.tolist()
        else:
            found = choices(expert.contiguous(), None, None, num_experts, False)
            self.unit, _, self.expert, self.offsets, self.inverse, self.place = found
            counts = self.offsets.diff().tolist()
        self.experts = [e for e, n in enumerate(counts) if n]
        self.counts = [n for n in counts if n]

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
    if not torch.is_grad_enabled():
        return _without_gradient(module, layout, x, index, weight, first, down, first_bias, down_bias)
    pre: Any = _First.apply(x, first, first_bias, index, turned)
    h = module._apply_gate(pre) if layout.has_gate else module.act_fn(pre)
    h, down, down_bias = operands("experts", h, down, down_bias)
    if not layout.has_post_expert_norm:
        return _Second.apply(h, down, down_bias, weight, index, turned)  # type: ignore[return-value]
    out = module.post_expert_norm(_Second.apply(h, down, down_bias, None, index, turned))
    return _Combine.apply(out, weight, index)  # type: ignore[return-value]


def _without_gradient(
    module: Any,
    layout: Layout,
    x: Tensor,
    index: _Index,
    weight: Tensor,
    first: Tensor,
    down: Tensor,
    first_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """The same values; nothing is kept."""
    turned = layout.is_transposed
    with autocast_off(x.device):
        pre = _products(index.gather(x), first, first_bias, index, turned)
    h = module._apply_gate(pre) if layout.has_gate else module.act_fn(pre)
    h, down, down_bias = operands("experts", h, down, down_bias)
    with autocast_off(x.device):
        out = _products(h, down, down_bias, index, turned)
    return index.combine(module.post_expert_norm(out) if layout.has_post_expert_norm else out, weight)


def _index(expert: Tensor, num_experts: int) -> _Index:
    if 0 < expert.numel() <= FEW:
        table = expert.reshape(-1).tolist()
        if min(table) >= 0 and max(table) < num_experts:
            return _Listed(expert, table)
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
            dtype = sum_dtype(grad.dtype)
            d_bias = grad.new_zeros(stack.shape[0], grad.shape[1], dtype=dtype)
            d_bias = d_bias.index_add_(0, index.expert, grad.to(dtype)).to(grad.dtype)
    return d_rows, d_stack, d_bias


def _products(rows: Tensor, stack: Tensor, bias: Tensor | None, index: _Index, turned: bool) -> Tensor:
    """[R, I] x [E, I, O] (not turned: [E, O, I]) -> [R, O]."""
    weight = stack.transpose(1, 2) if turned else stack
    backend = _for_all(index, rows, weight)
    if backend is not None and isinstance(index, _Sorted):
        return backend.products(rows, weight, index.offsets, bias)
    matrices = weight.transpose(1, 2)
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    each = zip(_chosen(matrices, index), _split(rows, index), _split(out, index))
    if bias is None:
        for matrix, part, result in each:
            torch.mm(part, matrix, out=result)
    else:
        for offset, (matrix, part, result) in zip(_chosen(bias, index), each):
            torch.addmm(offset, part, matrix, out=result)
    return out


def _for_all(index: _Index, rows: Tensor, weight: Tensor) -> Backend | None:
    """What computes the products of all experts in one call, where there is such a thing and it is worth it."""
    if not isinstance(index, _Sorted):
        return None
    found = choose(Spec.of(rows, weight))
    worth = found is native or (found is fused and len(index.experts) > MANY)
    return found if worth else None


def _outer(a: Tensor, b: Tensor, index: _Index, stack: Tensor) -> Tensor:
    """[R, I] x [R, O] -> [E, I, O], the shape of `stack`; exact zeros for experts without rows."""
    backend = _for_all(index, b, stack)
    if isinstance(index, _Sorted) and backend is not None and (backend is native or stack.nbytes < LARGE):
        return backend.outer(a, b, index.offsets)
    out = large_pages(torch.empty_like(stack, memory_format=torch.contiguous_format), fresh=True)
    lefts = torch.split_with_sizes(a.t(), index.counts, 1) if index.counts else ()
    begun: set[int] = set()
    for e, result, left, right in zip(index.experts, _chosen(out, index), lefts, _split(b, index)):
        if e in begun:
            result.addmm_(left, right)
        else:
            torch.mm(left, right, out=result)
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
