"""Exchanges give the bank's own y; the capacity exchange through tables of a fixed size."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from moestro.core.errors import UserError
from moestro.core.plan import Plan
from moestro.core.rows import Rows
from moestro.dispatch import Capacity, Exchange, Local, examples
from moestro.dispatch.capacity import padded_index
from moestro.dispatch.local import Attribute
from moestro.experts import MLP, Gated
from moestro.experts import examples as banks
from moestro.ops.combine import combine, gather_rows
from moestro.ops.rows import rows as derive
from moestro.testing.compare import assert_close
from moestro.testing.experts import check_exchange, plan_for

D, E, T = 16, 4, 24


@pytest.mark.parametrize("name", examples())
@pytest.mark.parametrize("bank", banks())
def test_conformance(name: str, bank: str) -> None:
    made = banks()[bank].build(dim=D, num_experts=E)
    check_exchange(lambda inner: examples()[name].build(inner), made, num_experts=E, capacity=T, tol=2e-6)


@pytest.mark.parametrize("name", examples())
def test_configs_travel_as_json(name: str) -> None:
    assert Exchange.from_dict(examples()[name].to_dict()) == examples()[name]


def limited(capacity: int) -> Plan:
    """A plan where the first choices of each expert up to `capacity` are kept, in the order of units."""
    plan = plan_for(T, E, 2)
    seen = [0] * E
    kept = torch.zeros_like(plan.expert, dtype=torch.bool)
    for t in range(T):
        for k in range(2):
            e = int(plan.expert[t, k])
            kept[t, k] = seen[e] < capacity
            seen[e] += 1
    weight = torch.where(kept, plan.weight, 0.0)
    return dataclasses.replace(plan, kept=kept, weight=weight, capacity=capacity, complete=False).check()


def through(exchange, bank: nn.Module, plan: Plan) -> list[Tensor]:
    bank.zero_grad()
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = plan.weight.clone().requires_grad_()
    index = derive(plan)
    y = combine(exchange(gather_rows(x, index), index), weight, index)
    y.square().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return [y.detach(), x.grad, weight.grad, *(p.grad.clone() for p in bank.parameters() if p.grad is not None)]


def test_kept_rows_come_out_as_from_the_local_exchange() -> None:
    bank = MLP(width=12, bias=True).build(dim=D, num_experts=E)
    plan = limited(7)
    assert plan.kept is not None
    assert int((~plan.kept).sum()) > 0
    local = through(Local().build(bank), bank, plan)
    table = through(Capacity().build(bank), bank, plan)
    for i, (a, b) in enumerate(zip(table, local, strict=True)):
        assert_close(f"tensor {i}", a, b, tol=2e-6)


class Spy:
    """A bank that notes what it is shown."""

    def __init__(self, bank: nn.Module) -> None:
        self.bank, self.shapes, self.index = bank, [], None

    def __call__(self, rows: Tensor, index: Rows, context=None, weights=None) -> Tensor:
        self.shapes.append(tuple(rows.shape))
        self.index = index
        return self.bank(rows, index, context, weights)


def test_the_inner_bank_sees_one_shape_whatever_the_routing() -> None:
    spy = Spy(Gated(width=4).build(dim=D, num_experts=E))
    exchange = Capacity().build(spy)
    for seed, starved in ((0, ()), (1, (2,)), (2, (0, 1))):
        plan = dataclasses.replace(plan_for(T, E, 2, starved=starved, seed=seed), capacity=T)
        index = derive(plan)
        exchange(torch.randn(2 * T, D), index)
        assert spy.index is not None
        assert spy.index.offsets.tolist() == [0, T, 2 * T, 3 * T, 4 * T]
    assert set(spy.shapes) == {(E * T, D)}


def test_the_table_is_a_consistent_index() -> None:
    plan = limited(7)
    index = dataclasses.replace(derive(plan), weight=torch.rand(int(plan.routed().sum())))
    place, table = padded_index(index)
    assert table.expert.tolist() == [e for e in range(E) for _ in range(7)]
    assert torch.equal(table.unit[place], index.unit)
    assert torch.equal(table.source[place], index.source)
    real = table.unit >= 0
    assert int(real.sum()) == index.unit.shape[0]
    assert torch.equal(table.inverse[table.unit[real], table.slot[real]], torch.arange(E * 7)[real])
    assert bool((table.inverse[index.inverse < 0] == -1).all())
    assert table.weight is not None
    assert index.weight is not None
    assert torch.equal(table.weight[place], index.weight)
    assert not table.weight[~real].any()


def test_gradient_through_the_table_in_float64() -> None:
    bank = Gated(width=3).build(dim=4, num_experts=E).double()
    plan = dataclasses.replace(plan_for(5, E, 2), capacity=5)
    index = derive(plan)
    exchange = Capacity().build(bank)
    x = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: exchange(x, index), x, fast_mode=True)


def test_without_a_capacity_the_error_says_what_to_do() -> None:
    bank = Gated(width=4).build(dim=D, num_experts=E)
    with pytest.raises(UserError, match=r"needs a plan with a capacity: give the router a limit"):
        Capacity().build(bank)(torch.randn(2 * T, D), derive(plan_for(T, E, 2)))


def test_a_capacity_that_the_rows_break_is_an_error() -> None:
    bank = Gated(width=4).build(dim=D, num_experts=E)
    plan = dataclasses.replace(plan_for(T, E, 2), capacity=3)
    with pytest.raises(UserError, match="over the plan's capacity of 3"):
        Capacity().build(bank)(torch.randn(2 * T, D), derive(plan))


def test_prepare_reaches_the_innermost() -> None:
    seen = []

    class Inner(Exchange):
        def build(self, inner):
            made = Local().build(inner)
            made.prepare = seen.append  # type: ignore[method-assign]
            return made

    plan = plan_for(T, E, 2)
    Capacity(inner=Capacity(inner=Inner())).build(None).prepare(plan)
    assert seen == [plan]


def test_an_attribute_follows_replacement_and_copies() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts: nn.Module = Gated(width=4).build(dim=D, num_experts=E)
            self.exchange = Local().build(Attribute(self, "experts"))

    holder = Holder()
    index, rows = derive(plan_for(T, E, 2)), torch.randn(2 * T, D)
    before = holder.exchange(rows, index)
    other = copy.deepcopy(holder)
    other.experts = MLP(width=4).build(dim=D, num_experts=E)
    assert torch.equal(holder.exchange(rows, index), before)
    assert torch.equal(other.exchange(rows, index), other.experts(rows, index))
    assert set(holder.state_dict()) == {"experts.gate_up", "experts.down"}
