"""The GPU kernels on a GPU: numbers, determinism, compiled graphs. Needs one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.plan import AnyPlan, Plan
from moestro.core.rows import Rows
from moestro.ops.combine import table_weight
from moestro.ops.expert_mlp import ACTIVATIONS, choose, gated_mixture, gated_mlp, gpu, mlp_mixture
from moestro.ops.rows import rows
from moestro.testing.compare import assert_close
from ops import expert_cases as oracle
from ops.ops_cases import bounds, every_plan, rand, randn, topk_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
PLANS = {name: plan for name, plan in every_plan().items() if rows(plan).unit.numel()}


@pytest.fixture(autouse=True)
def only_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "BACKENDS", (gpu,))


def moved(plan: AnyPlan) -> tuple[Rows, Tensor]:
    """The rows of a plan and its weights on the GPU."""
    index = rows(plan)
    tensors = {k: v.cuda() for k, v in vars(index).items() if isinstance(v, Tensor)}
    return Rows(**{**vars(index), **tensors}), table_weight(plan, index)


def check(plan: AnyPlan, D: int, F: int, dtype: torch.dtype, activation: str, gated: bool = True) -> None:
    index, E = rows(plan), plan.num_experts
    there, weight = moved(plan)
    given = [
        randn(index.num_units, D, dtype=dtype),
        weight,
        randn(E, (2 if gated else 1) * F, D, seed=1, dtype=dtype) / D**0.5,
        randn(E, D, F, seed=2, dtype=dtype) / F**0.5,
    ]
    if not gated:
        given += [randn(E, F, seed=3, dtype=dtype), randn(E, D, seed=4, dtype=dtype)]
    mine = [t.cuda().requires_grad_() for t in given]
    theirs = [t.double().requires_grad_() for t in given]
    run: Any = gated_mixture if gated else mlp_mixture
    want: Any = oracle.gated_mixture if gated else oracle.mlp_mixture
    y = run(*mine[:2], there, *mine[2:4], activation, *mine[4:])
    reference = want(*theirs[:2], index, *theirs[2:4], activation, *theirs[4:])
    assert_close("output", y, reference, TOLERANCE[dtype])
    grad = randn(*y.shape, seed=9, dtype=dtype)
    y.backward(grad.cuda())
    reference.backward(grad.double())
    for name, a, b in zip(("x", "weight", "first", "down", "first_bias", "down_bias"), mine, theirs):
        assert_close(f"gradient of {name}", a.grad, torch.zeros_like(b) if b.grad is None else b.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("routing", PLANS)
def test_routings(routing: str, dtype: torch.dtype) -> None:
    check(PLANS[routing], 64, 48, dtype, "silu")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, gated: bool) -> None:
    check(topk_plan(T=50, E=4), 64, 96, torch.bfloat16, activation, gated)


@pytest.mark.parametrize("shape", [(7, 5), (65, 33), (256, 128), (520, 264)])
@pytest.mark.parametrize("gated", [True, False])
def test_shapes(shape: tuple[int, int], gated: bool) -> None:
    check(topk_plan(T=70, K=3, E=5, used=4), *shape, torch.bfloat16, "gelu", gated)


def test_tall_tiles() -> None:
    """Enough rows per expert for the blocks of a real layer."""
    check(topk_plan(T=700, K=2, E=4), 256, 192, torch.bfloat16, "silu")


def test_rows_that_belong_to_nobody_are_zero() -> None:
    x = randn(300, 64, dtype=torch.bfloat16).cuda().requires_grad_()
    first, down = (t.cuda().bfloat16() for t in (randn(3, 64, 64, seed=1), randn(3, 64, 32, seed=2)))
    y = gated_mlp(x, first, down, bounds(40, 0, 100).cuda())
    y.sum().backward()
    assert x.grad is not None
    assert not y[140:].any()
    assert not x.grad[140:].any()
    assert bool(y[:140].any(1).all())


def large(T: int = 512, D: int = 256, F: int = 128, E: int = 8, K: int = 2) -> tuple[Plan, list[Tensor]]:
    plan = topk_plan(T=T, K=K, E=E)
    tensors = [randn(T, D), rand(T, K), randn(E, 2 * F, D, seed=1) / 16, randn(E, D, F, seed=2) / 11]
    return plan, [t.cuda() if i == 1 else t.cuda().bfloat16() for i, t in enumerate(tensors)]


def test_two_runs_give_the_same_bits() -> None:
    plan, tensors = large()
    index, _ = moved(plan)
    results = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = gated_mixture(leaves[0], leaves[1], index, *leaves[2:])
        y.backward(torch.ones_like(y))
        results.append([y, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("taken", [1, 3, 100])
def test_deterministic_units_do_not_see_each_other(taken: int) -> None:
    plan, (x, weight, *parameters) = large()
    index, _ = moved(plan)
    part = Plan(expert=plan.expert[:taken], weight=plan.weight[:taken], num_experts=8, complete=True)
    alone, _ = moved(part)
    y = gated_mixture(x, weight, index, *parameters, deterministic=True)
    few = gated_mixture(x[:taken], weight[:taken], alone, *parameters, deterministic=True)
    assert torch.equal(y[:taken], few)


def test_compiled_as_one_graph() -> None:
    plan, tensors = large()
    index, _ = moved(plan)

    def layer(x: Tensor, weight: Tensor, first: Tensor, down: Tensor) -> Tensor:
        return gated_mixture(x * 2, weight, index, first, down) + 1

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        y.backward(torch.ones_like(y))
        results.append([y, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        assert_close("compiled", a, b, 1e-2)
