"""Plan, ExpertChoice, Dense: counting, checking, merging, travelling."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moestro.core.errors import UserError
from moestro.core.plan import Dense, ExpertChoice, Plan, demand, from_tensors, load, merge, num_units, slim, to_tensors


def small(**changes) -> Plan:
    values = dict(
        expert=torch.tensor([[0, 2], [1, -1], [2, 3], [2, 0]]),
        weight=torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]),
        num_experts=3,
        virtual=("null",),
        valid=torch.tensor([True, True, True, False]),
    )
    return Plan(**(values | changes))


def test_demand_counts_real_choices_of_valid_units_before_capacity():
    kept = torch.tensor([[True, False], [True, True], [True, True], [True, True]])
    plan = small(kept=kept, weight=torch.tensor([[0.6, 0.0], [1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]))
    plan.check()
    assert demand(plan).tolist() == [1, 1, 2]
    assert load(plan).tolist() == [1, 1, 1]
    assert demand(plan).dtype == torch.int64


def test_expert_choice_and_dense_answer_the_same_questions():
    valid = torch.tensor([True, True, False])
    chosen = ExpertChoice(
        unit=torch.tensor([[[0, 1], [1, 2]]]),
        weight=torch.tensor([[[1.0, 0.5], [0.5, 0.0]]]),
        num_units=3,
        valid=valid,
    ).check()
    assert (num_units(chosen), chosen.num_experts) == (3, 2)
    assert demand(chosen).tolist() == load(chosen).tolist() == [2, 1]
    dense = Dense(weight=torch.ones(3, 4) * valid[:, None], valid=valid).check()
    assert load(dense).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(expert=torch.tensor([[0, 2], [1, -1], [2, 4], [2, 0]])), "ids must lie in -1..3"),
        (dict(expert=torch.zeros(4, 2, dtype=torch.int32)), "int64"),
        (dict(weight=torch.ones(4, 2)), "weight must be 0"),
        (dict(weight=torch.tensor([[float("nan"), 0], [1, 0], [1, 0], [0, 0]])), "NaN"),
        (dict(valid=torch.ones(3, dtype=torch.bool)), "valid must be [4]"),
        (dict(probs=torch.rand(4, 3)), "probs must be [4, 4]"),
        (dict(complete=True), "promises"),
        (dict(virtual=("nothing",)), "'nothing'"),
        (dict(owner=torch.tensor([0, 9])), "owner must name units"),
        (dict(capacity=0), "over the capacity"),
    ],
)
def test_a_bad_plan_is_refused_with_the_reason(changes, says):
    with pytest.raises(UserError, match=says.replace("[", r"\[").replace("]", r"\]")):
        small(**changes).check()


def test_merge_keeps_units_in_order_and_fills_what_one_part_lacks():
    a = small()
    b = Plan(
        expert=torch.tensor([[1], [0]]),
        weight=torch.ones(2, 1),
        num_experts=3,
        virtual=("null",),
        probs=torch.rand(2, 4),
    )
    both = merge([a, b]).check()
    assert both.expert.tolist() == [*a.expert.tolist(), [1, -1], [0, -1]]
    assert both.valid is not None
    assert both.valid.tolist() == [True, True, True, False, True, True]
    assert both.probs is None
    assert demand(both).tolist() == (demand(a) + demand(b)).tolist()
    with pytest.raises(UserError, match="same experts"):
        merge([a, dataclasses.replace(b, num_experts=4)])


@pytest.mark.parametrize("kind", ["plan", "choice", "dense"])
def test_round_trip_through_tensors(kind):
    plan = {
        "plan": small(meta={"task": torch.tensor([1, 1, 2, 2])}),
        "choice": ExpertChoice(unit=torch.tensor([[[0], [1]]]), weight=torch.ones(1, 2, 1), num_units=2),
        "dense": Dense(weight=torch.rand(2, 3)),
    }[kind]
    tensors, header = to_tensors(plan)
    again = from_tensors(tensors, header)
    assert type(again) is type(plan)
    for name, tensor in tensors.items():
        assert torch.equal(to_tensors(again)[0][name], tensor), name
    assert to_tensors(again)[1] == header
    with pytest.raises(UserError, match="schema"):
        from_tensors(tensors, header | {"schema": 99})
    with pytest.raises(UserError, match="no tensor 'surprise'"):
        from_tensors({**tensors, "surprise": torch.ones(1)}, header)
    with pytest.raises(UserError, match="incomplete"):
        from_tensors({}, header)


def test_slim_drops_what_is_as_large_as_the_batch_times_the_experts():
    plan = small(probs=torch.rand(4, 4), logits=torch.rand(4, 4), extra={"noise": torch.rand(4, 4)})
    thin = slim(plan)
    assert (thin.probs, thin.logits, dict(thin.extra)) == (None, None, {})
    assert slim(plan, frozenset({"probs"})).probs is plan.probs


def test_plans_are_pytrees():
    leaves, spec = torch.utils._pytree.tree_flatten(small())
    assert any(isinstance(x, torch.Tensor) for x in leaves)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert again.num_experts == 3
    assert again.expert is leaves[0]
