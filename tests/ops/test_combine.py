"""Gathering and combining: values, gradients, order of summation, bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moestro.core.plan import AnyPlan
from moestro.ops.combine import combine, gather_rows, naive, table_weight
from moestro.ops.rows import rows
from moestro.testing.compare import assert_close
from ops.ops_cases import choosing_plan, compare, every_plan, ragged_plan, rand, randn, topk_plan, twice

PLANS = every_plan()
UNITS = {"token": (8,), "sequence": (3, 4), "image": (2, 3, 5), "scalar": ()}


def sizes(plan: AnyPlan) -> tuple[int, int]:
    index = rows(plan)
    return index.num_units, index.unit.shape[0]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("expanded", [False, True])
def test_gather(name: str, expanded: bool) -> None:
    index = rows(PLANS[name])
    x = randn(index.num_units, 8)
    compare(["x"], lambda t: gather_rows(t, index), lambda t: naive.gather_rows(t, index), [x], expanded=expanded)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("expanded", [False, True])
def test_combine(name: str, expanded: bool) -> None:
    index = rows(PLANS[name])
    out = randn(index.unit.shape[0], 8)
    weight = rand(*index.inverse.shape)
    compare(
        ["out", "weight"],
        lambda o, w: combine(o, w, index),
        lambda o, w: naive.combine(o, w, index),
        [out, weight],
        expanded=expanded,
    )


@pytest.mark.parametrize("name", PLANS)
def test_table_weight(name: str) -> None:
    plan, index = PLANS[name], rows(PLANS[name])

    def both(function: object, weight: torch.Tensor) -> torch.Tensor:
        table = function(dataclasses.replace(plan, weight=weight), index)  # type: ignore[operator]
        return table.masked_fill(index.inverse < 0, 0)  # a Plan's own table has weights of copies

    compare(["weight"], lambda w: both(table_weight, w), lambda w: both(naive.table_weight, w), [plan.weight])


@pytest.mark.parametrize("unit", UNITS)
def test_units_of_any_shape(unit: str) -> None:
    plan = ragged_plan()
    index = rows(plan)
    x, out = randn(index.num_units, *UNITS[unit]), randn(index.unit.shape[0], *UNITS[unit])
    compare(["x"], lambda t: gather_rows(t, index), lambda t: naive.gather_rows(t, index), [x])
    compare(
        ["out", "weight"],
        lambda o, w: combine(o, w, index),
        lambda o, w: naive.combine(o, w, index),
        [out, rand(*index.inverse.shape)],
    )


@pytest.mark.parametrize("plan", [topk_plan(T=5), ragged_plan(T=5), choosing_plan(T=5, C=2)], ids=["top", "rag", "ec"])
def test_gradcheck(plan: AnyPlan) -> None:
    index = rows(plan)
    x = randn(index.num_units, 3, dtype=torch.float64).requires_grad_()
    out = randn(index.unit.shape[0], 3, dtype=torch.float64).requires_grad_()
    weight = rand(*index.inverse.shape).double().requires_grad_()
    torch.autograd.gradcheck(lambda t: gather_rows(t, index), (x,))
    torch.autograd.gradcheck(lambda o, w: combine(o, w, index), (out, weight))
    raw = plan.weight.double().requires_grad_()
    torch.autograd.gradcheck(lambda w: table_weight(dataclasses.replace(plan, weight=w), index), (raw,))


@pytest.mark.parametrize("name", ["top2", "ragged"])
def test_the_order_of_the_sum(name: str) -> None:
    """1e8 + 1 - 1e8 tells in which order three terms were added, and that they were added in fp32."""
    plan = topk_plan(K=3) if name == "top2" else ragged_plan(K=3)
    index = rows(plan)
    values = torch.tensor([1e8, 1.0, -1e8])
    out = values[index.slot][:, None].expand(-1, 4).contiguous()
    y = combine(out, torch.ones(index.inverse.shape), index)
    for t, row in enumerate(index.inverse.tolist()):
        total = torch.zeros(())
        for k, r in enumerate(row):
            if r >= 0:
                total = total + values[k]
        assert torch.equal(y[t], total.expand(4)), (t, row)


def test_half_precision_sums_in_fp32() -> None:
    """512 terms of 1: a bfloat16 sum stops at 256."""
    plan = topk_plan(T=3, K=512, E=512)
    index = rows(plan)
    out = torch.ones(index.unit.shape[0], 4, dtype=torch.bfloat16)
    y = combine(out, torch.ones(3, 512), index)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.full_like(y, 512))
    x = torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(x, index).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x.grad, 512))


@pytest.mark.parametrize("name", ["top2", "ragged", "expert choice", "dense, padded"])
def test_half_precision_values(name: str) -> None:
    index = rows(PLANS[name])
    out, weight = randn(index.unit.shape[0], 8, dtype=torch.bfloat16), rand(*index.inverse.shape)
    compare(
        ["out", "weight"],
        lambda o, w: combine(o, w, index),
        lambda o, w: naive.combine(o, w, index),
        [out, weight],
        4e-3,
    )


@pytest.mark.parametrize("name", ["ragged", "expert choice"])
def test_rows_of_others_cannot_poison(name: str) -> None:
    """A unit without a row is 0 even where the row that its empty entry might point at is not finite."""
    index = rows(PLANS[name])
    out = torch.full((index.unit.shape[0], 4), float("nan"))
    for dtype in (torch.float32, torch.bfloat16):
        y = combine(out.to(dtype), torch.ones(index.inverse.shape), index)
        without = (index.inverse < 0).all(1)
        assert bool(without.any())
        assert torch.equal(y[without], torch.zeros_like(y[without]))
        assert bool(y[~without].isnan().all())


@pytest.mark.parametrize("name", ["top2", "ragged", "expert choice", "dense"])
def test_same_bits_twice(name: str) -> None:
    index = rows(PLANS[name])
    twice(lambda x: gather_rows(x, index), [randn(index.num_units, 65)])
    twice(lambda o, w: combine(o, w, index), [randn(index.unit.shape[0], 65), rand(*index.inverse.shape)])


def test_non_contiguous_inputs() -> None:
    index = rows(topk_plan())
    x, out = randn(8, index.num_units).t(), randn(8, index.unit.shape[0]).t()
    weight = rand(2, index.num_units).t()
    assert torch.equal(gather_rows(x, index), gather_rows(x.contiguous(), index))
    assert torch.equal(combine(out, weight, index), combine(out.contiguous(), weight.contiguous(), index))
    o, w = out.clone().requires_grad_(), weight.clone().requires_grad_()
    y = combine(o.t().contiguous().t(), w.t().contiguous().t(), index)
    y.backward(randn(8, index.num_units).t())
    a, b = o.grad, w.grad
    o.grad = w.grad = None
    combine(o, w, index).backward(randn(8, index.num_units).t().contiguous())
    assert_close("out", a, o.grad, 1e-7)
    assert_close("weight", b, w.grad, 1e-7)


def test_only_what_is_asked_for() -> None:
    index = rows(topk_plan())
    out, weight = randn(index.unit.shape[0], 8), rand(*index.inverse.shape).requires_grad_()
    combine(out, weight, index).sum().backward()
    assert weight.grad is not None
    assert not combine(out, weight.detach(), index).requires_grad


@pytest.mark.parametrize("name", ["top2", "ragged", "no rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_that_a_compiler_sees(name: str, dtype: torch.dtype) -> None:
    index = rows(every_plan()[name])
    R = index.unit.shape[0]
    out, grad = randn(R, 5, dtype=dtype), randn(index.num_units, 5, dtype=dtype)
    ops = torch.ops.moestro
    for weight in (None, rand(*index.inverse.shape)):
        torch.library.opcheck(ops.sum_rows.default, (out, weight, index.inverse))
    torch.library.opcheck(ops.scaled_rows.default, (grad, index.unit, rand(R), dtype))
    torch.library.opcheck(ops.row_dots.default, (out, grad, index.unit))
