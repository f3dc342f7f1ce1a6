"""A few choices, without a gradient and without sorting: for each, the rows of its expert's matrices are read once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.precision import autocast_off, operands
from .recognise import Layout

__all__ = ["few"]


def few(
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
    """The weighted sum of every unit's experts, with the module's own gate, activation and norm.

    Shapes: x [T, D], expert [T, K], weight [T, K], stacks as `layout` says -> [T, D]. Choices outside
    0..num_experts-1 add nothing. Sums are taken in the dtype of `weight`.
    """
    chosen = [
        (t, k, e) for t, row in enumerate(expert.tolist()) for k, e in enumerate(row) if 0 <= e < module.num_experts
    ]
    y = torch.zeros(x.shape, dtype=weight.dtype, device=x.device)
    if not chosen:
        return y
    experts = [e for _, _, e in chosen]
    rows = [x[t] for t, _, _ in chosen]
    pre = _products("experts", layout, rows, first, first_bias, experts)
    h = module._apply_gate(pre) if layout.has_gate else module.act_fn(pre)
    out = _products("experts", layout, list(h.unbind(0)), down, down_bias, experts)
    if layout.has_post_expert_norm:
        out = module.post_expert_norm(out)
    out = out.to(weight.dtype)
    for (t, k, _), row in zip(chosen, out.unbind(0)):
        y[t].addcmul_(row, weight[t, k])
    return y


def _products(
    what: str, layout: Layout, rows: list[Tensor], stack: Tensor, bias: Tensor | None, experts: list[int]
) -> Tensor:
    """[n, O]: each row times the matrix of its expert."""
    matrices = stack.detach() if layout.is_transposed else stack.detach().transpose(1, 2)  # [E, I, O]
    out = []
    for row, e in zip(rows, experts):
        matrix, vector = matrices[e], row[None]
        if bias is None:
            vector, matrix = operands(what, vector, matrix)
            with autocast_off(row.device):
                out.append(torch.mm(vector, matrix))
        else:
            vector, matrix, offset = operands(what, vector, matrix, bias[e])
            with autocast_off(row.device):
                out.append(torch.addmm(offset, vector, matrix))
    return torch.cat(out)
