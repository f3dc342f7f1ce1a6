"""Top-p as its authors run it, and what counting takes for the number of experts (21)."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.moe.config import MoELayer
from moestro.routers import Noisy, Raw, Router, SimilarityMix, TopK, TopP
from routers.router_cases import build, exact, units

RELEASED = Router(select=TopP(p=0.4, as_released=True), weigh=Raw())


def test_21_the_released_sums_round_p_too() -> None:
    """Four equal experts sum to 0.25, 0.5, 0.75, 1 exactly; 0.4999 is 0.5 in bfloat16."""
    logits = torch.zeros(1, 4)
    for p, exactly, released in ((0.4999, 2, 3), (0.49, 2, 2), (0.5, 3, 3), (0.9999, 4, 4)):
        told = Signals(knobs={"top_p": p})
        for select, taken in ((TopP(), exactly), (TopP(as_released=True), released)):
            plan, _ = exact(Router(select=select, weigh=Raw()), 4)(logits, told)
            assert int((plan.expert >= 0).sum()) == taken, (p, select)


def test_21_the_released_choice_is_that_of_the_released_steps() -> None:
    """Softmax, sort, cumulative sum and comparison in bfloat16: the first position past p is kept, later ones are not;
    where none is, all are."""
    router, x = build(RELEASED), units(400)
    plan, _ = router(x)
    assert plan.logits is not None
    probs = plan.logits.detach().bfloat16().softmax(-1)
    value, index = probs.sort(dim=-1, descending=True, stable=True)
    past = value.cumsum(-1) > 0.4
    first = torch.where(past.any(-1), past.long().argmax(-1), past.shape[1])
    dropped = torch.arange(past.shape[1]) > first[:, None]
    assert torch.equal(plan.expert, index.masked_fill(dropped, -1))
    exactly, _ = build(RELEASED.replace(select=TopP(p=0.4)))(x)
    differs = ((exactly.expert >= 0).sum(1) != (plan.expert >= 0).sum(1)).sum()
    assert 0 < differs < 40  # near p only
    same = plan.expert[:, 0] == exactly.expert[:, 0]
    assert torch.equal(plan.weight[same, 0], exactly.weight[same, 0])  # weights are not rounded
    capped, _ = build(RELEASED.replace(select=TopP(p=0.4, max_k=2, as_released=True)))(x)
    assert torch.equal(capped.expert, plan.expert[:, :2])
    noisy, _ = build(RELEASED.replace(score=Noisy())).train()(x)
    noisy.check()


def test_released_top_p_is_a_softmax_of_its_own() -> None:
    for changes in ({"mix": SimilarityMix()}, {"activation": "sigmoid"}):
        with pytest.raises(UserError, match="as_released"):
            RELEASED.replace(**changes)


def test_counting_takes_the_expected_number() -> None:
    def active(select: object) -> tuple[int, int]:
        layer = MoELayer(num_experts=8, router=Router(select=select, weigh=Raw()))  # type: ignore[arg-type]
        return layer.num_active_params(dim=8), layer.flops_per_token(1, dim=8)

    assert active(TopP(expected=2.0)) == active(TopK(k=2))
    assert active(TopP()) == active(TopK(k=8))
    assert active(TopP(max_k=3)) == active(TopK(k=3))
    one, two = active(TopK(k=1)), active(TopK(k=2))
    assert active(TopP(expected=1.5)) == tuple((a + b) // 2 for a, b in zip(one, two))
    with pytest.raises(UserError, match="expected"):
        TopP(expected=0.0)
