"""Rows against the oracle, in both implementations, for every kind of plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moestro.core.errors import UserError
from moestro.core.plan import AnyPlan, ExpertChoice, Plan
from moestro.core.rows import Rows
from moestro.ops.rows import derive, naive, rows
from moestro.testing.compare import assert_close
from ops.ops_cases import every_plan, ragged_plan, topk_plan

TENSORS = ("unit", "slot", "expert", "offsets", "inverse", "source")
PLANS = every_plan()


def same(got: Rows, want: Rows) -> None:
    for name in TENSORS:
        assert_close(name, getattr(got, name), getattr(want, name), dtype=True)
    assert (got.num_experts, got.num_units, got.capacity) == (want.num_experts, want.num_units, want.capacity)


@pytest.mark.parametrize("name", PLANS)
def test_rows_are_the_oracles(name: str) -> None:
    same(rows(PLANS[name]), naive.rows(PLANS[name]))


@pytest.mark.parametrize("name", [n for n, p in PLANS.items() if isinstance(p, Plan)])
def test_the_path_of_other_devices_agrees(name: str) -> None:
    plan = PLANS[name]
    assert isinstance(plan, Plan)
    tables = derive._choices(plan.expert, plan.kept, plan.valid, plan.num_experts, plan.complete)
    for field, got in zip(TENSORS, tables, strict=True):
        assert_close(field, got, getattr(naive.rows(plan), field), dtype=True)


@pytest.mark.parametrize("name", PLANS)
def test_tables_point_at_each_other(name: str) -> None:
    plan, index = PLANS[name], rows(PLANS[name])
    R = index.unit.shape[0]
    assert int((index.inverse >= 0).sum()) == R == int(plan.routed().sum())
    assert torch.equal(index.inverse[index.unit, index.slot], torch.arange(R))
    key = index.expert * max(1, index.num_units) + index.unit
    assert bool((key.diff() >= 0).all())
    weight = plan.weight.reshape(-1)[index.source]
    assert bool((weight != 0).all())  # these plans have no zero weight but where there is no row


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_table(data: Any) -> None:
    T, K, E = data.draw(st.integers(0, 7)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    cells = st.lists(st.integers(-1, E), min_size=T * K, max_size=T * K)
    flags = st.lists(st.booleans(), min_size=T * K, max_size=T * K)
    expert = torch.tensor(data.draw(cells), dtype=torch.int64).view(T, K)
    kept = torch.tensor(data.draw(flags), dtype=torch.bool).view(T, K)
    valid = torch.tensor(data.draw(flags)[:T], dtype=torch.bool)
    plan = Plan(expert=expert, weight=torch.ones(T, K), num_experts=E, kept=kept, valid=valid, virtual=("null",))
    same(rows(plan), naive.rows(plan))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_choice_of_experts(data: Any) -> None:
    G, E, C, T = (data.draw(st.integers(1, n)) for n in (2, 4, 3, 6))
    cells = st.lists(st.integers(-1, T - 1), min_size=G * E * C, max_size=G * E * C)
    unit = torch.tensor(data.draw(cells), dtype=torch.int64).view(G, E, C)
    plan = ExpertChoice(unit=unit, weight=torch.ones(G, E, C), num_units=T)
    same(rows(plan), naive.rows(plan))


def test_many_experts_need_wider_keys() -> None:
    """256 experts no longer fit 8-bit keys together with the mark of absence; 70000 not 16-bit ones."""
    for E in (255, 256, 257, 70_000):
        expert = torch.randint(-1, E, (50, 4), generator=torch.Generator().manual_seed(E))
        expert[0] = E - 1
        plan = Plan(expert=expert, weight=torch.ones(50, 4), num_experts=E)
        index = rows(plan)
        order = torch.sort(torch.where(expert >= 0, expert, E).reshape(-1), stable=True)
        R = int((expert >= 0).sum())
        assert torch.equal(index.source, order.indices[:R])
        assert torch.equal(index.expert, order.values[:R])
        assert int(index.offsets[-1]) == R


def test_non_contiguous_tables() -> None:
    plan = ragged_plan()
    assert plan.kept is not None
    other = dataclasses.replace(plan, expert=plan.expert.t().contiguous().t(), kept=plan.kept.t().contiguous().t())
    assert not other.expert.is_contiguous()
    same(rows(other), rows(plan))


def test_a_broken_promise_is_said() -> None:
    plan = topk_plan()
    expert = plan.expert.clone()
    expert[0, 0] = -1
    with pytest.raises(UserError, match="complete"):
        rows(dataclasses.replace(plan, expert=expert))


def test_results_are_nobodys_views() -> None:
    for plan in PLANS.values():
        index = rows(plan)
        storages = [getattr(index, n).untyped_storage().data_ptr() for n in TENSORS if getattr(index, n).numel()]
        assert len(set(storages)) == len(storages)


def fake_shapes(plan: AnyPlan) -> dict[str, tuple[Any, ...]]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: mode.from_tensor(t, static_shapes=True), plan)
    with mode:
        index = rows(fake)
    return {n: tuple(getattr(index, n).shape) for n in TENSORS}


@pytest.mark.parametrize("name", PLANS)
def test_shapes_without_data(name: str) -> None:
    plan, index = PLANS[name], rows(PLANS[name])
    for field, shape in fake_shapes(plan).items():
        real = tuple(getattr(index, field).shape)
        assert len(shape) == len(real)
        for a, b in zip(shape, real):
            assert not isinstance(a, int) or a == b
    static = isinstance(fake_shapes(plan)["unit"][0], int)
    assert static == (plan.complete if isinstance(plan, Plan) else plan.valid is None and name.startswith("dense"))


def test_registered_ops_pass_torchs_checks() -> None:
    plan = ragged_plan()
    torch.library.opcheck(
        torch.ops.moestro.rows_of_choices.default,
        (plan.expert, plan.kept, plan.valid, plan.num_experts, False),
        test_utils=("test_schema", "test_faketensor"),
    )
    choosing = PLANS["expert choice"]
    assert isinstance(choosing, ExpertChoice)
    torch.library.opcheck(
        torch.ops.moestro.rows_of_units.default,
        (choosing.unit, choosing.valid, choosing.num_units),
        test_utils=("test_schema", "test_faketensor"),
    )
    dense = PLANS["dense, padded"]
    torch.library.opcheck(
        torch.ops.moestro.rows_of_all.default,
        (dense.weight, dense.valid),
        test_utils=("test_schema", "test_faketensor"),
    )
