"""SparseMixer by hand, against transformers' function, and its draws in training."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.routers import NearBest, Router, SparseMixer, TopK
from moestro.routers.router import StepRouter
from moestro.testing.compare import assert_close
from routers.router_cases import exact, signals

LOGITS = torch.tensor([[2.0, 1.9, 1.0, -1.0]])


def mixer(epsilon: float = 0.05, k: int = 2, num_experts: int = 4) -> StepRouter:
    return exact(Router(select=SparseMixer(k=k, epsilon=epsilon), weigh=NearBest(epsilon=epsilon)), num_experts)


def test_two_by_hand() -> None:
    """1.9 lacks 0.05 of 2.0 and is near at 0.1; then 1.0 lacks 9/19 of 1.9 and is not."""
    plan, _ = mixer().eval()(LOGITS)
    assert plan.expert.tolist() == [[0, 1]]
    assert plan.complete
    assert_close("weights", plan.weight, torch.tensor([[1 / (1 + math.exp(-0.1)), 1.0]]), 1e-6)


def test_three_by_hand_with_a_negative_best() -> None:
    """Last choice: of -1 and -1.1 the second lacks 0.1 of 1.1, near at 0.2."""
    plan, _ = mixer(0.1, k=3).eval()(torch.tensor([[-1.1, 3.0, 1.0, -1.0]]))
    assert plan.expert.tolist() == [[1, 2, 3]]
    assert_close("weights", plan.weight, torch.tensor([[1.0, 1.0, 1 / (1 + math.exp(-0.1))]]), 1e-6)


def test_equal_logits_go_to_the_lower_index_and_share() -> None:
    plan, _ = mixer().eval()(torch.zeros(1, 4))
    assert plan.expert.tolist() == [[0, 1]]
    assert_close("weights", plan.weight, torch.tensor([[1 / 4, 1 / 3]]), 1e-6)


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_equals_transformers_function(epsilon: float) -> None:
    sparsemixer = importlib.import_module("transformers.models.phimoe.modeling_phimoe").sparsemixer
    logits = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight, expert = sparsemixer(logits, epsilon, training=False)
    plan, _ = mixer(epsilon, num_experts=8).eval()(logits)
    assert torch.equal(plan.expert, expert)
    assert_close("weights", plan.weight, weight, 1e-6)
    direction = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    (want,) = torch.autograd.grad((weight * direction).sum(), logits)
    (got,) = torch.autograd.grad((plan.weight * direction).sum(), logits)
    assert_close("gradient of the logits", got, want, 1e-5)


def test_training_draws_from_the_masked_softmax() -> None:
    T = 20_000
    router = mixer(0.4).train()
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]]).expand(T, -1)  # near 2.0 at 0.8: 1.0 and 0.5, but not -1.0
    plan, _ = router(logits, signals(T))
    again, _ = router(logits, signals(T))
    assert torch.equal(plan.expert, again.expert)
    assert torch.equal(plan.weight, again.weight)
    p = torch.tensor([2.0, 1.0, 0.5]).softmax(0)
    first = torch.bincount(plan.expert[:, 0], minlength=4) / T
    assert first[3] == 0
    assert_close("share of the first choice", first[:3], p, 0.02)
    assert bool((plan.expert[:, 0] != plan.expert[:, 1]).all())
    # after 2.0 was taken: near 1.0 at 0.8 lies 0.5 only
    second = plan.expert[plan.expert[:, 0] == 0, 1]
    assert_close(
        "second", torch.bincount(second, minlength=4)[1:3] / len(second), torch.tensor([1.0, 0.5]).softmax(0), 0.02
    )

    whole = torch.where(plan.expert[:, 0] == 0, p[0], torch.where(plan.expert[:, 0] == 1, p[1], p[2]))
    share = plan.weight[:, 0] / whole
    cut = (share - 1 / 3).abs() < 1e-5
    assert bool((cut | ((share - 1).abs() < 1e-5)).all())
    assert not bool(cut[plan.expert[:, 0] == 0].any()), "the most probable choice is never cut"
    assert float(cut[plan.expert[:, 0] != 0].float().mean()) == pytest.approx(0.75, abs=0.02)


def test_the_gradient_in_training_is_not_cut() -> None:
    """As transformers' custom function has it: p_e (1[j = e] - p_j), whatever the draw."""
    router = mixer(0.4).train()
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]]).repeat(64, 1).requires_grad_()
    plan, _ = router(logits, signals(64))
    (got,) = torch.autograd.grad(plan.weight[:, 0].sum(), logits)
    p = torch.tensor([2.0, 1.0, 0.5, -math.inf]).softmax(0)
    chosen = torch.nn.functional.one_hot(plan.expert[:, 0], 4)
    want = (chosen * p).sum(1, keepdim=True) * (chosen - p)
    assert len(set(plan.expert[:, 0].tolist())) == 3
    assert_close("gradient", got, want, 1e-5)


def test_padding_and_temperature() -> None:
    valid = torch.tensor([True, False])
    plan, _ = mixer()(LOGITS.expand(2, -1), Signals(valid=valid))
    assert plan.expert[1].tolist() == [-1, -1]
    assert plan.weight[1].tolist() == [0.0, 0.0]
    hot, _ = mixer().eval()(LOGITS, Signals(knobs={"temperature": 2.0}))
    assert_close("weights", hot.weight, torch.tensor([[1 / (1 + math.exp(-0.05)), 1.0]]), 1e-6)


def test_errors() -> None:
    with pytest.raises(UserError, match="epsilon is 0.1 in SparseMixer and 0.2 in NearBest"):
        Router(select=SparseMixer(epsilon=0.1), weigh=NearBest(epsilon=0.2))
    with pytest.raises(UserError, match="must be positive"):
        NearBest(epsilon=0.0)
    with pytest.raises(UserError, match="top_k 5 is not in 1..4"):
        Router(select=SparseMixer(k=5), weigh=NearBest()).build(dim=4, num_experts=4)
    assert Router(select=TopK(k=1), weigh=NearBest()).build(dim=4, num_experts=4).top_k == 1
