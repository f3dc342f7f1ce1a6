"""Every loss against numbers worked out by hand from its published equation."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from moestro.core.errors import MissingSignalError, UserError
from moestro.core.plan import Dense, ExpertChoice, Plan
from moestro.losses import (
    GShardBalance,
    ImportanceCV2,
    LoadCV2,
    MutualInformation,
    PerUnitBalance,
    RoutingEntropy,
    SequenceBalance,
    SwitchBalance,
    TokenInformation,
    ZLoss,
)


def plan_of(expert, probs=None, num_experts=None, weight=None, **fields):
    expert = torch.tensor(expert)
    probs = None if probs is None else torch.tensor(probs, dtype=torch.float64)
    if weight is None:
        weight = (expert >= 0).double() / expert.shape[1]
    return Plan(
        expert=expert,
        weight=torch.as_tensor(weight, dtype=torch.float64),
        num_experts=num_experts or probs.shape[1] - len(fields.get("virtual", ())),
        probs=probs,
        **fields,
    )


def near(value, want):
    assert value.ndim == 0
    assert float(value) == pytest.approx(want, abs=1e-12)


# Switch Transformer eq. 4-6 ---------------------------------------------------------------------------------------


def test_switch_eq_4_to_6():
    # choices 0 0 1 0: f = (3/4, 1/4, 0); P = column means (0.5, 0.3, 0.2): 3 * (0.375 + 0.075) = 1.35
    plan = plan_of([[0], [0], [1], [0]], [[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.2, 0.6, 0.2], [0.7, 0.1, 0.2]])
    near(SwitchBalance().build()(plan), 1.35)


def test_p_of_the_distribution_before_the_mix():
    # 03: f = (3/4, 1/4, 0) of what was selected; P of the unmixed rows = (0.2, 0.2, 0.6): 3 * (0.15 + 0.05) = 0.6
    mixed = [[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.2, 0.6, 0.2], [0.7, 0.1, 0.2]]
    extra = {"unmixed_probs": torch.tensor([[0.2, 0.2, 0.6]] * 4, dtype=torch.float64)}
    plan = plan_of([[0], [0], [1], [0]], mixed, extra=extra)
    near(SwitchBalance().build()(plan), 1.35)
    near(SwitchBalance(of="unmixed").build()(plan), 0.6)
    near(PerUnitBalance(of="unmixed").build()(plan), 0.6)
    near(SwitchBalance(of="unmixed").build()(plan_of([[0], [0], [1], [0]], mixed)), 1.35)


def test_switch_is_one_when_uniform_and_e_when_collapsed():
    uniform = plan_of([[0, 1], [2, 3], [1, 0], [3, 2]], [[0.25] * 4] * 4)
    near(SwitchBalance().build()(uniform), 1.0)
    collapsed = plan_of([[2]] * 5, [[0.0, 0.0, 1.0, 0.0]] * 5)
    near(SwitchBalance().build()(collapsed), 4.0)


def test_two_layers_of_opposite_collapse_give_e_each_and_not_one():
    loss = SwitchBalance().build()
    first = loss.stats(plan_of([[0]] * 6, [[1.0, 0.0]] * 6))
    second = loss.stats(plan_of([[1]] * 6, [[0.0, 1.0]] * 6))
    near(loss.value(first), 2.0)
    near(loss.value(second), 2.0)
    near(loss.value(first + second), 1.0)  # what pooling over layers would have hidden


def test_switch_counts_choices_before_capacity():
    free = plan_of([[0], [0], [1]], [[0.6, 0.4]] * 3)
    cut = plan_of([[0], [0], [1]], [[0.6, 0.4]] * 3, kept=torch.tensor([[True], [False], [True]]), capacity=1)
    near(SwitchBalance().build()(free), 2 * (2 / 3 * 0.6 + 1 / 3 * 0.4))
    near(SwitchBalance().build()(cut), 2 * (2 / 3 * 0.6 + 1 / 3 * 0.4))


def test_switch_with_variable_k_is_a_share_of_choices():
    # 5 choices: f = (3/5, 2/5, 0); P = (0.5, 0.3, 0.2)
    plan = plan_of([[0, -1], [0, 1], [0, 1]], [[0.5, 0.3, 0.2]] * 3)
    near(SwitchBalance().build()(plan), 3 * (0.6 * 0.5 + 0.4 * 0.3))


def test_switch_is_blind_to_virtual_ids():
    # id 2 is a null expert with half the mass; among real experts choices are 1:1, probabilities 3:1 and 1:3
    plan = plan_of([[0], [1], [2]], [[0.375, 0.125, 0.5], [0.125, 0.375, 0.5], [0.25, 0.25, 0.5]], virtual=("null",))
    near(SwitchBalance().build()(plan), 1.0)
    lopsided = plan_of([[0], [2], [2]], [[0.3, 0.1, 0.6]] * 3, virtual=("null",))
    near(SwitchBalance().build()(lopsided), 2 * 0.75)
    logits = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    made = Plan(
        expert=torch.tensor([[0], [2], [2]]),
        weight=torch.ones(3, 1, dtype=torch.float64),
        num_experts=2,
        virtual=("null",),
        probs=logits.softmax(-1),
    )
    SwitchBalance().build()(made).backward()
    assert logits.grad[:, :2].abs().max() > 1e-3
    assert logits.grad[:, 2].abs().max() < 1e-15


def test_sigmoid_scores_are_normalised_per_unit_as_in_deepseek_v3_eq_19():
    plan = plan_of([[0], [1]], [[0.9, 0.3], [0.2, 0.6]])  # normalised: (0.75, 0.25), (0.25, 0.75)
    near(SwitchBalance().build()(plan), 1.0)
    near(RoutingEntropy().build()(plan), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


# Its relatives ----------------------------------------------------------------------------------------------------


def test_per_unit_balance_equals_mean_k_when_uniform():
    # brief of dynamic routing: L_b equals the mean number of chosen experts for uniform P and balanced F
    plan = plan_of([[0, 1, 2], [3, -1, -1], [1, 0, -1], [2, 3, -1]], [[0.25] * 4] * 4)
    near(PerUnitBalance().build()(plan), 2.0)
    near(SwitchBalance().build()(plan), 1.0)


def test_per_unit_balance_by_hand():
    # F = (2/2, 1/2, 1/2); P = (0.5, 0.3, 0.2)
    plan = plan_of([[0, 1], [0, 2]], [[0.5, 0.3, 0.2]] * 2)
    near(PerUnitBalance().build()(plan), 3 * (0.5 + 0.15 + 0.1))


def test_gshard_algorithm_1_counts_first_choices():
    # first choices 0 0 1: c = (2/3, 1/3, 0); P = (0.5, 0.3, 0.2)
    plan = plan_of([[0, 2], [0, 1], [1, 0]], [[0.5, 0.3, 0.2]] * 3)
    near(GShardBalance().build()(plan), 3 * (2 / 3 * 0.5 + 1 / 3 * 0.3))
    near(GShardBalance().build()(plan_of([[0, 1], [1, 0]], [[0.5, 0.5]] * 2)), 1.0)


def test_deepseek_v3_eq_17_to_20():
    # sequence 7: choices 0 0, P = (0.8, 0.2): 2 * 1 * 0.8 = 1.6; sequence 3: choices 0 1, P = (0.5, 0.5): 1
    plan = plan_of([[0], [0], [0], [1]], [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.4, 0.6]])
    segment = torch.tensor([7, 3, 7, 3])
    near(SequenceBalance().build()(plan, segment=segment), (1.6 + 1.0) / 2)


def test_robust_qa_balance_counts_first_choices_inside_sequences():
    """13: the mean over sequences of E * sum_e F_e P_e, F of first choices; at least 1."""
    # sequence 0: first choices 0 0, P = (0.8, 0.2): 2 * 0.8 = 1.6; sequence 1: 0 1, P = (0.5, 0.5): 1
    plan = plan_of([[0, 1], [0, 1], [0, 1], [1, 0]], [[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.4, 0.6]])
    segment = torch.tensor([0, 0, 1, 1])
    near(SequenceBalance(of="first").build()(plan, segment=segment), (1.6 + 1.0) / 2)
    near(SequenceBalance().build()(plan, segment=segment), 1.0)  # with both choices every sequence is uniform


def test_sequences_that_collapse_apart_are_seen_though_the_batch_is_uniform():
    plan = plan_of([[0], [0], [1], [1]], [[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 2)
    near(SequenceBalance().build()(plan, segment=torch.tensor([0, 0, 1, 1])), 2.0)
    near(SwitchBalance().build()(plan), 1.0)


# Shazeer et al. 2017 ----------------------------------------------------------------------------------------------


def test_shazeer_eq_6_and_7_importance():
    # weights by expert: 0.7 + 1.0, 0.3 + 0, 0.6, 0.4 => (1.7, 0.3, 0.6, 0.4), mean 0.75
    plan = plan_of([[0, 1], [2, 3], [0, -1]], num_experts=4, weight=[[0.7, 0.3], [0.6, 0.4], [1.0, 0.0]])
    square = (0.95**2 + 0.45**2 + 0.15**2 + 0.35**2) / 4
    near(ImportanceCV2().build()(plan), square / (0.75**2 + 1e-10))
    near(ImportanceCV2(unbiased=True).build()(plan), square * 4 / 3 / (0.75**2 + 1e-10))


def test_importance_is_zero_when_equal_and_e_minus_one_when_collapsed():
    near(ImportanceCV2().build()(plan_of([[0], [1]], num_experts=2)), 0.0)
    collapsed = ImportanceCV2().build()(plan_of([[3]] * 4, num_experts=5))
    assert float(collapsed) == pytest.approx(4.0, rel=1e-9)


def test_importance_of_probabilities_and_of_other_kinds_of_plan():
    probs = [[0.5, 0.5], [0.1, 0.9]]  # sums 0.6, 1.4
    want = 0.4**2 / (1 + 1e-10)
    near(ImportanceCV2(of="probs").build()(plan_of([[0], [1]], probs)), want)
    weight = torch.tensor(probs, dtype=torch.float64)
    near(ImportanceCV2().build()(Dense(weight=weight)), want)
    chosen = ExpertChoice(
        unit=torch.tensor([[[0, 1], [1, -1]]]),
        weight=torch.tensor([[[0.2, 0.4], [1.4, 0.0]]], dtype=torch.float64),
        num_units=2,
    )
    near(ImportanceCV2().build()(chosen), want)


def test_shazeer_eq_8_to_11_load():
    phi = NormalDist().cdf
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    noisy = torch.tensor([[1.5, 1.8, 0.1]], dtype=torch.float64)
    std = torch.tensor([[1.0, 0.5, 2.0]], dtype=torch.float64)
    plan = plan_of([[1]], num_experts=3, logits=logits, extra={"noisy_logits": noisy, "noise_std": std})
    # best of the others: for 0 it is 1.8, for 1 it is 1.5, for 2 it is 1.8
    load = [phi(0.2), phi((1.0 - 1.5) / 0.5), phi((0.0 - 1.8) / 2.0)]
    mean = sum(load) / 3
    near(LoadCV2().build()(plan), sum((v - mean) ** 2 for v in load) / 3 / (mean**2 + 1e-10))


def test_load_with_k_2_excludes_the_expert_itself():
    phi = NormalDist().cdf
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    extra = {"noisy_logits": logits.clone(), "noise_std": torch.ones(1, 1, dtype=torch.float64)}
    stats = LoadCV2().build().stats(plan_of([[0, 1]], num_experts=4, logits=logits, extra=extra))
    want = [phi(2.0 - 0.0), phi(1.0 - 0.0), phi(0.0 - 1.0), phi(-1.0 - 1.0)]
    torch.testing.assert_close(stats["load"], torch.tensor(want, dtype=torch.float64))


def test_load_with_as_many_choices_as_experts_is_certain():
    logits = torch.randn(3, 2, dtype=torch.float64)
    extra = {"noisy_logits": logits, "noise_std": torch.ones(3, 2, dtype=torch.float64)}
    stats = LoadCV2().build().stats(plan_of([[0, 1]] * 3, num_experts=2, logits=logits, extra=extra))
    assert stats["load"].tolist() == [3.0, 3.0]


def test_load_without_noise_counts_choices():
    stats = LoadCV2().build().stats(plan_of([[0], [0], [1]], num_experts=2))
    assert stats["load"].dtype == torch.int64
    assert stats["load"].tolist() == [2, 1]
    assert float(LoadCV2().build().value(stats)) == pytest.approx((0.5 / 1.5) ** 2)


# Logits and distributions -----------------------------------------------------------------------------------------


def test_st_moe_eq_5_z_loss():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.float64)
    plan = plan_of([[0], [0]], num_experts=2, logits=logits)
    near(ZLoss().build()(plan), (math.log(2) ** 2 + math.log(4) ** 2) / 2)
    far = plan_of([[0]], num_experts=2, logits=torch.tensor([[1000.0, 0.0]], dtype=torch.float64))
    near(ZLoss().build()(far), 1e6)


def test_routing_entropy_l_d():
    near(RoutingEntropy().build()(plan_of([[0]], [[0.25] * 4])), math.log(4))
    near(RoutingEntropy().build()(plan_of([[0]], [[1.0, 0.0, 0.0]])), 0.0)
    near(RoutingEntropy().build()(plan_of([[0], [0]], [[0.5, 0.5], [1.0, 0.0]])), math.log(2) / 2)
    near(RoutingEntropy().build()(Dense(weight=torch.ones(1, 2), probs=torch.full((1, 2), 0.5).double())), math.log(2))


def test_entropy_of_a_certain_router_has_a_finite_gradient():
    logits = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    plan = Plan(expert=torch.tensor([[0]]), weight=torch.ones(1, 1), num_experts=3, probs=logits.softmax(-1))
    (RoutingEntropy().build()(plan) + TokenInformation().build()(plan)).backward()
    assert torch.isfinite(logits.grad).all()


def test_token_information_is_marginal_minus_conditional_entropy():
    certain = plan_of([[0], [1]], [[1.0, 0.0], [0.0, 1.0]])
    near(TokenInformation().build()(certain), -math.log(2))
    near(TokenInformation().build()(plan_of([[0], [1]], [[0.5, 0.5]] * 2)), 0.0)
    near(TokenInformation().build()(plan_of([[0], [0]], [[1.0, 0.0]] * 2)), 0.0)


def test_mod_squad_mutual_information():
    loss = MutualInformation().build()
    apart = plan_of([[0], [0], [1]], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    near(loss(apart, task=torch.tensor([0, 0, 1])), -math.log(2))
    near(loss(apart, task=torch.tensor([1, 1, 1])), 0.0)
    # by counts, tasks weigh 2/3 and 1/3
    counted = MutualInformation(prior="counts").build()
    near(counted(apart, task=torch.tensor([0, 0, 1])), 2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    # task -1 is no task
    mixed = plan_of([[0], [1], [0]], [[1.0, 0.0], [0.0, 1.0], [0.3, 0.7]])
    near(loss(mixed, task=torch.tensor([0, 1, -1])), -math.log(2))


def test_mutual_information_by_hand():
    # p(e|0) = (0.75, 0.25), p(e|1) = (0.25, 0.75), marginal (0.5, 0.5)
    plan = plan_of([[0], [0], [1]], [[0.9, 0.1], [0.6, 0.4], [0.25, 0.75]])
    within = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    near(MutualInformation().build()(plan, task=torch.tensor([0, 0, 1])), within - math.log(2))


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SwitchBalance(), PerUnitBalance(), GShardBalance(), LoadCV2()])
def test_balance_of_what_is_equal_by_construction_is_refused(config):
    dense = Dense(weight=torch.full((2, 2), 0.5), probs=torch.full((2, 2), 0.5))
    with pytest.raises(UserError, match="has no meaning for Dense"):
        config.build()(dense)
    chosen = ExpertChoice(unit=torch.tensor([[[0], [1]]]), weight=torch.ones(1, 2, 1), num_units=2)
    with pytest.raises(UserError, match="take .* out of the losses"):
        config.build()(chosen)


@pytest.mark.parametrize("config", [SwitchBalance(), ZLoss(), RoutingEntropy(), TokenInformation()])
def test_a_plan_without_scores_is_refused_by_name(config):
    with pytest.raises(UserError, match=f"{config.build().name} needs the router's"):
        config.build()(plan_of([[0]], num_experts=2))


def test_missing_signals_are_named():
    plan = plan_of([[0]], [[0.5, 0.5]])
    with pytest.raises(MissingSignalError, match=r"Signals\(segment=\.\.\.\)"):
        SequenceBalance().build()(plan)
    with pytest.raises(MissingSignalError, match=r"Signals\(task=\.\.\.\)"):
        MutualInformation().build()(plan)


def test_a_task_beyond_num_tasks_is_refused():
    with pytest.raises(UserError, match="set num_tasks"):
        MutualInformation().build()(plan_of([[0]], [[0.5, 0.5]]), task=torch.tensor([2]))
    with pytest.raises(UserError, match="num_tasks must be at least 1"):
        MutualInformation(num_tasks=0)
