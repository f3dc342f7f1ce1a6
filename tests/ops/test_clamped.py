"""Gated experts with biases and GPT-OSS's clamped unit, through every backend of torch's own products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.core.plan import AnyPlan
from moestro.ops.combine import combine, gather_rows, table_weight
from moestro.ops.combine import naive as combining
from moestro.ops.expert_mlp import Clamp, Spec, by_expert, choose, gated_mixture, gated_mlp, gpu, naive, native, stacked
from moestro.ops.rows import rows
from moestro.testing.compare import assert_close
from ops.ops_cases import compare, every_plan, randn, topk_plan

CLAMPS = {"plain": None, "clamped": Clamp(1.702, 1.5)}  # a limit that about every eighth value passes
NAMES = ["x", "weight", "gate_up", "down", "gate_up_bias", "down_bias"]


@pytest.fixture(params=["by_expert", "whole_products"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    first = by_expert if request.param == "by_expert" else stacked
    monkeypatch.setattr(choose, "BACKENDS", (first, by_expert))
    monkeypatch.setattr(stacked, "CACHED", 10**9)


def parameters(E: int, D: int = 8, F: int = 12) -> list[Tensor]:
    return [randn(E, 2 * F, D, seed=1), randn(E, D, F, seed=2), randn(E, 2 * F, seed=3), randn(E, D, seed=4)]


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("plan", every_plan())
def test_mixture_and_all_gradients(plan: str, clamp: str) -> None:
    made: AnyPlan = every_plan()[plan]
    index = rows(made)

    def mine(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return gated_mixture(x, w, index, a, b, gate_up_bias=c, down_bias=d, clamp=CLAMPS[clamp])

    def theirs(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        gathered = combining.gather_rows(x, index)
        out = naive.gated_mlp(gathered, a, b, index.offsets, "silu", None, c, d, CLAMPS[clamp])
        return combining.combine(out, w, index)

    values = [randn(index.num_units, 8), table_weight(made, index), *parameters(made.num_experts)]
    compare(NAMES, mine, theirs, values)


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("biased", [True, False])
def test_rows_and_finite_differences(clamp: str, biased: bool) -> None:
    index = rows(topk_plan(T=4, K=1, E=3, used=2))
    values = [p.double().requires_grad_() for p in (randn(4, 5), *parameters(3, 5, 4))]
    values = values if biased else values[:3]

    def apply(x: Tensor, a: Tensor, b: Tensor, *c: Tensor) -> Tensor:
        bias = dict(zip(("gate_up_bias", "down_bias"), c))
        return gated_mlp(x, a, b, index.offsets, clamp=CLAMPS[clamp], **bias)

    assert torch.autograd.gradcheck(apply, values)
    got = apply(*values)
    want = naive.gated_mlp(
        values[0], values[1], values[2], index.offsets, "silu", None, *values[3:], clamp=CLAMPS[clamp]
    )
    assert_close("rows", got, want, 1e-12)


def test_the_limits_by_hand() -> None:
    """One number in, one out: gate 3 and up -3 at limit 2, alpha 1: 2 sigmoid(2) (-2 + 1); gate -3, up 1: inside."""
    gate_up, down = torch.tensor([[[1.0], [-1.0]]]), torch.ones(1, 1, 1)
    offsets, s = torch.tensor([0, 2]), torch.sigmoid(torch.tensor([2.0, -1.0]))
    x = torch.tensor([[3.0], [-1.0]], requires_grad=True)
    y = gated_mlp(x, gate_up, down, offsets, clamp=Clamp(1.0, 2.0))
    assert_close("y", y[:, 0], torch.stack([2 * s[0] * (-2 + 1), -1 * s[1] * (1 + 1)]), 1e-6)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[0] == 0, "outside of both limits"
    slope = s[1] * (1 - (1 - s[1])) * 2 + -1 * s[1] * -1
    assert_close("gradient inside", x.grad[1], slope[None], 1e-6)


def test_bf16_and_compile() -> None:
    plan = topk_plan(T=9)
    index = rows(plan)
    values = [randn(9, 8), *parameters(6)]
    exact = gated_mixture(
        values[0], plan.weight, index, values[1], values[2], gate_up_bias=values[3], down_bias=values[4],
        clamp=Clamp(1.702, 7.0),
    )  # fmt: skip
    low = [v.to(torch.bfloat16) for v in values]

    def apply(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return gated_mixture(x, plan.weight, index, a, b, gate_up_bias=c, down_bias=d, clamp=Clamp(1.702, 7.0))

    assert_close("bf16", apply(*low), exact, 3e-2)
    compiled = torch.compile(apply, backend="aot_eager", fullgraph=True)
    inputs = [v.clone().requires_grad_() for v in values]
    y = compiled(*inputs)
    assert_close("compiled", y, exact, 1e-6)
    y.sum().backward()
    assert all(v.grad is not None for v in inputs)


def test_kernels_that_do_not_know_them_say_so() -> None:
    spec = Spec(device="cpu", dtype=torch.float32, rows=20, dim=8, width=12, experts=4)
    for changes, reason in (({"clamped": True}, "clamped"), ({"biased": True}, "biases of gated")):
        able, why = native.supported(Spec(**{**vars(spec), **changes}))
        assert not able
        assert reason in why
        cuda = {**vars(spec), **changes, "device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16}
        able, why = gpu.supported(Spec(**cuda))
        assert not able
        assert reason in why


def test_errors() -> None:
    x, (gate_up, down, first, second), offsets = randn(4, 8), parameters(2), torch.tensor([0, 2, 4])
    with pytest.raises(UserError, match=r"gate_up_bias must be \[2, 24\], not \[2, 12\]"):
        gated_mlp(x, gate_up, down, offsets, gate_up_bias=first[:, :12])
    with pytest.raises(UserError, match=r"down_bias must be \[2, 8\]"):
        gated_mlp(x, gate_up, down, offsets, down_bias=second[:1])
    with pytest.raises(UserError, match="activation of its own; leave out 'gelu'"):
        gated_mlp(x, gate_up, down, offsets, "gelu", clamp=Clamp(1.0, 1.0))
    with pytest.raises(UserError, match="unequal widths have no biases"):
        gated_mlp(x, randn(8, 8), randn(4, 8), offsets, widths=(1, 3), down_bias=second)


def test_mixture_is_gather_experts_combine() -> None:
    plan = topk_plan(T=9)
    index = rows(plan)
    x, (a, b, c, d) = randn(9, 8), parameters(6)
    options = {"gate_up_bias": c, "down_bias": d, "clamp": CLAMPS["clamped"]}
    apart = combine(gated_mlp(gather_rows(x, index), a, b, index.offsets, **options), plan.weight, index)  # type: ignore[arg-type]
    assert_close("mixture", gated_mixture(x, plan.weight, index, a, b, **options), apart, 1e-6)  # type: ignore[arg-type]
