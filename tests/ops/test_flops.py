"""torch's FlopCounterMode counts the products of every operation, forward and backward, at their true shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moestro.core.plan import Plan
from moestro.ops.cross_entropy import cross_entropy
from moestro.ops.expert_mlp import gated_few, gated_mixture, gated_mlp, mlp
from moestro.ops.grouped import grouped_linear
from moestro.ops.rows import rows
from ops.ops_cases import bounds, randn

COUNTS = (5, 0, 9, 3)
R, E, D, F = 17, 4, 20, 12
OFFSETS = bounds(*COUNTS)


def count(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[int, int]:
    """(forward, backward) FLOPs."""
    leaves = [t.requires_grad_() for t in inputs]
    with FlopCounterMode(display=False) as forward:
        y = function(*leaves)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.usefixtures("each_grouped_backend")
@pytest.mark.parametrize("sizes", [(20, 12), (19, 11)], ids=["aligned", "odd"])
def test_grouped_linear(sizes: tuple[int, int]) -> None:
    inputs, outputs = sizes
    once = 2 * R * inputs * outputs
    got = count(lambda r, w: grouped_linear(r, w, OFFSETS), randn(R, inputs), randn(E, outputs, inputs))
    assert got == (once, 2 * once)


def test_gated_mlp() -> None:
    once = 2 * R * D * 3 * F
    tensors = randn(R, D), randn(E, 2 * F, D), randn(E, D, F)
    assert count(lambda r, u, d: gated_mlp(r, u, d, OFFSETS), *tensors) == (once, 2 * once)


def test_unequal_widths() -> None:
    widths = (3, 50, 7, 11)
    once = sum(2 * n * D * 3 * f for n, f in zip(COUNTS, widths))
    tensors = randn(R, D), randn(2 * sum(widths), D), randn(sum(widths), D)
    assert count(lambda r, u, d: gated_mlp(r, u, d, OFFSETS, "silu", widths), *tensors) == (once, 2 * once)


def test_mlp() -> None:
    once = 2 * R * D * 2 * F
    tensors = randn(R, D), randn(E, F, D), randn(E, D, F), randn(E, F), randn(E, D)
    assert count(lambda r, u, d, a, b: mlp(r, u, d, OFFSETS, "gelu", a, b), *tensors) == (once, 2 * once)


def test_mixture() -> None:
    """The gradient of the combine weights costs no product; gradients that nobody wants cost nothing."""
    plan = Plan(expert=torch.tensor([[0, 2], [2, -1], [3, 2]]), weight=torch.rand(3, 2), num_experts=E)
    index, rows_made = rows(plan), 5
    once = 2 * rows_made * D * 3 * F
    tensors = randn(3, D), plan.weight, randn(E, 2 * F, D), randn(E, D, F)
    assert count(lambda x, w, u, d: gated_mixture(x, w, index, u, d), *tensors) == (once, 2 * once)
    x, weight, up, down = (t.detach() for t in tensors)
    got = count(lambda x: gated_mixture(x, weight, index, up, down), x)
    assert got == (once, once)  # frozen experts: the way back through each matrix
    with FlopCounterMode(display=False) as few, torch.no_grad():
        gated_few(x[:1], plan.expert[:1], weight[:1], up, down)
    assert few.get_total_flops() == 2 * 2 * D * 3 * F


def test_cross_entropy() -> None:
    """The gradient is made during the forward pass: three products there, none later."""
    V = 31
    target = torch.arange(R)
    got = count(lambda h, w: cross_entropy(h, w, target, chunk=5)[0], randn(R, D), randn(V, D))
    assert got == (3 * 2 * R * D * V, 0)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        cross_entropy(randn(R, D), randn(V, D), target, chunk=5)
    assert forward.get_total_flops() == 2 * R * D * V
