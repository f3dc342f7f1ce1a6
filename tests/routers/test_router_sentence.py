"""Whole sentences routed alike (34, first version): router averaged over tokens, raw weights, no weight for one."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import UserError
from moestro.core.plan import Plan
from moestro.core.signals import Signals
from moestro.models.config import Encoder
from moestro.moe.config import MoELayer
from moestro.nn.config import Attention
from moestro.routers.config import Constant, Jitter, Linear, Noisy, Raw, Router, SegmentMean, TopK
from moestro.routers.router import StepRouter
from moestro.routers.segments import segment_mean
from moestro.testing.compare import assert_close

SENTENCES = torch.tensor([7, 7, 7, -2, -2])
LOGITS = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0], [2.0, 6.0, 1.0], [0.0, 0.0, 5.0], [0.0, 4.0, 1.0]])


def exact(config: Router) -> StepRouter:
    """A router whose logits of single tokens are its input."""
    router = config.build(dim=3, num_experts=3)
    with torch.no_grad():
        router.score.inner.weight.copy_(torch.eye(3))
    return router


def plan(router: Router, valid: torch.Tensor | None = None) -> Plan:
    made, _ = exact(router)(LOGITS, Signals(segment=SENTENCES, valid=valid))
    assert isinstance(made, Plan)
    return made


def test_sentence_wise_top_k_of_brief_34() -> None:
    """Means [2, 2, 1] and [0, 2, 3]; the weights are the softmax of these, not renormalised; ties to the lower one."""
    made = plan(Router(score=SegmentMean(), select=TopK(k=2), weigh=Raw()))
    mean = torch.tensor([[2.0, 2.0, 1.0]] * 3 + [[0.0, 2.0, 3.0]] * 2)
    assert_close("logits", made.logits, mean, 1e-6)
    assert made.expert.tolist() == [[0, 1]] * 3 + [[2, 1]] * 2
    assert_close("weights", made.weight, mean.softmax(-1).gather(1, made.expert), 1e-6)
    assert float(made.weight.detach().sum(1).max()) < 0.99


def test_sentence_switch_of_brief_34_has_no_weight() -> None:
    made = plan(Router(score=SegmentMean(), select=TopK(k=1), weigh=Constant(value=1.0)))
    assert made.expert[:, 0].tolist() == [0, 0, 0, 2, 2]
    assert made.weight.tolist() == [[1.0]] * 5


def test_padding_is_no_part_of_a_sentence() -> None:
    """Without its third and fifth token the means are [2, 0, 1] and [0, 0, 5]."""
    made = plan(Router(score=SegmentMean(), select=TopK(k=1), weigh=Raw()), torch.tensor([1, 1, 0, 1, 0]).bool())
    assert made.expert[:, 0].tolist() == [0, 0, -1, 2, -1]
    assert_close("logits", made.logits[:2], torch.tensor([[2.0, 0.0, 1.0]] * 2), 1e-6)  # type: ignore[index]


def test_the_gradient_is_shared_by_the_tokens() -> None:
    x = (LOGITS.double() + torch.arange(3) / 10).requires_grad_()  # no ties
    router = exact(Router(score=SegmentMean(), select=TopK(k=2), weigh=Raw())).double()
    assert torch.autograd.gradcheck(lambda t: router(t, Signals(segment=SENTENCES))[0].weight, (x,))


def test_means_by_definition() -> None:
    g = torch.Generator().manual_seed(0)
    values, segment = torch.randn(30, 4, generator=g), torch.randint(-3, 3, (30,), generator=g) * 10**9
    valid = torch.rand(30, generator=g) < 0.7
    want = torch.stack([values[(segment == s) & valid].mean(0) for s in segment])
    assert_close("means", segment_mean(values, segment, valid), want, 1e-6)
    loud = torch.where(valid[:, None], values, float("nan"))
    assert torch.equal(segment_mean(loud, segment, valid), segment_mean(values, segment, valid))
    assert not segment_mean(values, segment, torch.zeros(30, dtype=torch.bool)).any()


def test_an_encoder_routes_each_of_its_texts_as_one() -> None:
    router = Router(score=SegmentMean(inner=Linear(bias=True)), select=TopK(k=1), weigh=Raw())
    model = Encoder(
        vocab_size=20,
        dim=16,
        num_layers=2,
        attention=Attention(num_heads=2, causal=False),
        moe=MoELayer(num_experts=4, router=router, losses=()),
    ).build()
    _, _, trail = model(torch.arange(18).view(3, 6))
    for made in trail.plans().values():
        chosen = made.expert.view(3, 6)
        assert bool((chosen == chosen[:, :1]).all())


@pytest.mark.parametrize("inner", [Noisy(), Jitter()])
def test_noise_of_single_tokens_is_refused(inner: Noisy | Jitter) -> None:
    with pytest.raises(UserError, match=rf"SegmentMean.inner: {type(inner).__name__} draws for each token"):
        SegmentMean(inner=inner)
