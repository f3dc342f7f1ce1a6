"""Weigh steps by hand, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.routers import (
    All,
    Constant,
    ExpertChoiceSelect,
    Gumbel,
    LossFree,
    Raw,
    Renormalised,
    Router,
    SoftmaxKept,
    TopK,
    TopP,
    Weigh,
)
from moestro.routers.steps import Scores
from routers.router_cases import EXAMPLES, build, exact, log, signals, units, weights

P = [[0.1, 0.4, 0.2, 0.3]]


@pytest.mark.parametrize(
    ("weigh", "expected"),
    [
        (Raw(), [0.4, 0.3]),
        (Raw(scale=2.0), [0.8, 0.6]),
        (Renormalised(), [4 / 7, 3 / 7]),
        (Renormalised(scale=2.5), [10 / 7, 7.5 / 7]),
        (Renormalised(epsilon=0.1), [0.5, 0.375]),
        (Renormalised(floor=0.6), [4 / 7, 3 / 7]),
        (Renormalised(scale=2.0, epsilon=0.1, floor=1.0), [0.8, 0.6]),
        (SoftmaxKept(), [4 / 7, 3 / 7]),
        (Constant(), [0.5, 0.5]),
        (Constant(value=1.0), [1.0, 1.0]),
    ],
)
def test_weights_of_two(weigh: Weigh, expected: list[float]) -> None:
    plan, _ = exact(Router(select=TopK(k=2), weigh=weigh), 4)(log(P))
    torch.testing.assert_close(plan.weight, torch.tensor([expected]))


@pytest.mark.parametrize(
    ("weigh", "expected"),
    [
        (Renormalised(), [[4 / 7, 3 / 7, 0.0]]),
        (SoftmaxKept(), [[4 / 7, 3 / 7, 0.0]]),
        (Constant(), [[0.5, 0.5, 0.0]]),
        (Constant(value=1.0), [[1.0, 1.0, 0.0]]),
    ],
)
def test_absent_choices_weigh_nothing(weigh: Weigh, expected: list[list[float]]) -> None:
    x = log(P).requires_grad_()
    plan, _ = exact(Router(select=TopP(p=0.5, max_k=3), weigh=weigh), 4)(x)
    torch.testing.assert_close(plan.weight, torch.tensor(expected))
    if plan.weight.requires_grad:
        plan.weight[0, 0].backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("weigh", [Renormalised(), SoftmaxKept(), Constant(), Raw()])
def test_units_without_any_choice_give_zero_and_no_nan(weigh: Weigh) -> None:
    x = units(4, 4).requires_grad_()
    plan, _ = exact(Router(weigh=weigh), 4)(x, Signals(valid=torch.tensor([False, True, False, True])))
    assert plan.weight[[0, 2]].tolist() == [[0.0, 0.0]] * 2
    plan.check()
    if plan.weight.requires_grad:
        (plan.weight * torch.tensor([1.0, 2.0])).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        assert x.grad[[0, 2]].abs().sum() == 0


def test_weighing_an_empty_row_by_itself() -> None:
    scores = Scores(logits=units(2, 4), probs=units(2, 4).softmax(-1))
    expert = torch.tensor([[-1, -1], [3, -1]])
    for weigh in (Renormalised(), SoftmaxKept(), Constant(), Raw(), Constant(value=2.0)):
        weight = weigh.build()(scores, expert)
        assert weight[0].tolist() == [0.0, 0.0]
        assert weight[1, 1] == 0


def test_small_probabilities_are_renormalised_too() -> None:
    plan, _ = exact(Router(activation="sigmoid"), 3)(torch.tensor([[-20.0, -21.0, -30.0]]))
    torch.testing.assert_close(plan.weight, torch.tensor([[1.0, math.exp(-1)]]) / (1 + math.exp(-1)))


def test_the_router_of_few_units_divides_by_the_same() -> None:
    x = log([[0.1, 0.4, 0.2, 0.3]])
    for weigh in (Renormalised(epsilon=0.5), Renormalised(floor=2.0)):
        router = exact(Router(select=TopK(k=2), weigh=weigh), 4)
        want, _ = router(x)
        with torch.no_grad():
            torch.testing.assert_close(router(x)[0].weight, want.weight)


def test_probabilities_that_underflow_do_not_become_nan() -> None:
    x = torch.tensor([[-200.0, -300.0, -250.0]])
    plan, _ = exact(Router(activation="sigmoid"), 3)(x)
    assert plan.weight.tolist() == [[0.0, 0.0]]


def test_softmax_kept_follows_the_temperature() -> None:
    x = torch.tensor([[0.0, 1.0, 3.0]])
    plan, _ = exact(Router(weigh=SoftmaxKept(), temperature=2.0), 3)(x)
    assert plan.weight[0, 0].item() == pytest.approx(1 / (1 + math.exp(-1.0)))
    knob, _ = exact(Router(weigh=SoftmaxKept()), 3)(x, Signals(knobs={"temperature": 2.0}))
    assert torch.equal(knob.weight, plan.weight)
    assert torch.equal(plan.logits, x)


def test_cosines_may_weigh_negatively() -> None:
    x = torch.tensor([[-0.2, -0.5]])
    plan, _ = exact(Router(activation="identity", select=TopK(k=1), weigh=Raw()), 2)(x)
    assert plan.expert.tolist() == [[0]]
    torch.testing.assert_close(plan.weight, torch.tensor([[-0.2]]))


def test_one_choice_that_always_weighs_one_is_refused() -> None:
    for select in (TopK(k=1), Gumbel(k=1), LossFree(inner=TopK(k=1))):
        for weigh in (Renormalised(), SoftmaxKept()):
            with pytest.raises(UserError, match=r"use weigh=Raw\(\)"):
                Router(select=select, weigh=weigh)


def test_expert_choice_has_no_weights_per_unit() -> None:
    for weigh in (Renormalised(), SoftmaxKept(), Constant()):
        with pytest.raises(UserError, match="experts choose"):
            build(Router(select=ExpertChoiceSelect(), weigh=weigh))
    plan, _ = build(Router(select=ExpertChoiceSelect(), weigh=Constant(value=0.5)))(units(16))
    assert plan.weight.unique().tolist() == [0.5]


def test_dense_softmax_kept_is_the_softmax() -> None:
    plan, _ = build(Router(select=All(), weigh=SoftmaxKept()))(units(5))
    torch.testing.assert_close(plan.weight, plan.probs)


TRAINED = [n for n, c in EXAMPLES.items() if not isinstance(c.weigh, Constant)]


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_weights_in_float64(name: str) -> None:
    """With respect to x and every parameter that is trained, at a point where no small step changes the choice."""
    router = build(name).double()
    router.train(not router.weigh.draws)  # in training those estimate the gradient of a draw
    given = signals(12, per_segment=6)
    trained = [p for p in router.parameters() if p.requires_grad and not _is_noise(router, p)]

    def weight(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return weights(router(x, given)[0])

    x = units(12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(weight, (x, *trained), eps=1e-7, atol=1e-5, fast_mode=True)


def _is_noise(router: torch.nn.Module, parameter: torch.Tensor) -> bool:
    return any(parameter is p for n, p in router.named_parameters() if n.endswith("noise"))


@pytest.mark.parametrize("name", [n for n in TRAINED if n != "frozen"])
def test_the_router_learns_from_the_weights(name: str) -> None:
    router = build(name)
    plan, _ = router(units(24), signals(24))
    table = weights(plan)
    (table * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    for key, parameter in router.named_parameters():
        if parameter.requires_grad and not key.endswith("noise"):
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key
