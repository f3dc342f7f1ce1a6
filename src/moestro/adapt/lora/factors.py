"""Pairs of low-rank factors: their shapes, initial values, product with rows, and sum into a weight."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.draws import fold
from ...ops.grouped import grouped_linear

__all__ = ["add_product", "draw", "low_rank", "new_pair"]


def new_pair(
    outputs: int, inputs: int, rank: int, like: Tensor, num_experts: int | None, shared: str = "none"
) -> tuple[nn.Parameter, nn.Parameter]:
    """A [E, r, I] and B [E, O, r], without the expert axis where shared; B is zeros. Not yet drawn."""
    a, b = (rank, inputs), (outputs, rank)
    if num_experts is not None and shared not in ("a", "both"):
        a = (num_experts, *a)
    if num_experts is not None and shared not in ("b", "both"):
        b = (num_experts, *b)
    floating = like.dtype if like.is_floating_point() else torch.float32
    return tuple(nn.Parameter(torch.zeros(s, dtype=floating, device=like.device)) for s in (a, b))  # type: ignore[return-value]


@torch.no_grad()
def draw(parameter: Tensor, seed: int, name: str) -> None:
    """Initial values of A and of routers: those of `nn.Linear`, uniform in +-1/sqrt(inputs), by seed and name."""
    if parameter.is_meta:
        return
    word = fold(seed, name)
    assert isinstance(word, int)
    bound = 1 / math.sqrt(parameter.shape[-1])
    values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(word))
    parameter.copy_(values)


def low_rank(rows: Tensor, a: Tensor, b: Tensor, offsets: Tensor | None = None) -> Tensor:
    """B A x of every row, through rank r: nothing as large as B A is made.

    Shapes: rows [R, I], a [E, r, I] or [r, I], b [E, O, r] or [O, r], offsets [E+1] where there are experts -> [R, O].
    """
    inner = F.linear(rows, a) if a.ndim == 2 or offsets is None else grouped_linear(rows, a, offsets)
    return F.linear(inner, b) if b.ndim == 2 or offsets is None else grouped_linear(inner, b, offsets)


@torch.no_grad()
def add_product(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """weight += scale * B A in place, one expert at a time. Shapes: weight [E, O, I] or [O, I], a and b as above.

    The sum is taken in fp32 at least, and rounded once to the weight's dtype.
    """
    if weight.ndim == 2:
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale))
        return
    for e, matrix in enumerate(weight.unbind(0)):
        add_product(matrix, a if a.ndim == 2 else a[e], b if b.ndim == 2 else b[e], scale)
