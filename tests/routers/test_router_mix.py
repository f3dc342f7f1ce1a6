"""Mix steps by hand (03, arXiv 2505.00792): Rbar = S R and Rbar = A R, their limits, causality, and cached decoding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flop_cases import counter
from moestro.core.account import cost
from moestro.core.carry import Carry
from moestro.core.errors import UserError
from moestro.core.plan import Plan
from moestro.core.signals import Signals
from moestro.experts import Gated
from moestro.losses import SwitchBalance
from moestro.models import examples as models
from moestro.moe import MoELayer
from moestro.nn import Attention
from moestro.routers import AttentionMix, FixedNoise, Mix, NearBest, Raw, Router, SimilarityMix, SoftmaxKept, TopK
from moestro.routers.router import StepRouter
from moestro.serve.generate import generate
from moestro.testing.attend import Map
from routers.router_cases import DIM, build, log, signals, units, weights

R = log([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.2, 0.5]], torch.float64)


def plan_of(router: StepRouter, x: Tensor, given: Signals | None = None) -> Plan:
    plan = router(x, given)[0]
    assert isinstance(plan, Plan)
    return plan


def probs(router: StepRouter, x: Tensor, given: Signals | None = None) -> Tensor:
    found = plan_of(router, x, given).probs
    assert found is not None
    return found


def by_hand(similarity: Tensor, *, causal: bool = True, **changes: object) -> StepRouter:
    """Three experts whose logits are x, and U W_s U^T = similarity for x = R."""
    mix = SimilarityMix(start="random", causal=causal, **changes)  # type: ignore[arg-type]
    router = Router(mix=mix, weigh=Raw(), select=TopK(k=1)).build(dim=3, num_experts=3).double()
    inverse = torch.linalg.inv(R)
    with torch.no_grad():
        router.score.weight.copy_(torch.eye(3))
        router.mix.weight.copy_(inverse @ similarity @ inverse.T)
    return router


def test_rbar_is_s_r_by_hand() -> None:
    """S = softmax(U W_s U^T / tau): rows (1), (1/4, 3/4) and (1/2, 1/4, 1/4) of a causal sequence."""
    similarity = 2.0 * torch.tensor([[0, 9, 9], [0, math.log(3), 9], [math.log(2), 0, 0]], dtype=torch.float64)
    plan = plan_of(by_hand(similarity, tau=2.0), R)
    want = [[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0.45, 0.3, 0.25]]
    torch.testing.assert_close(plan.probs, torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(plan.extra["unmixed_probs"], R.softmax(-1))
    assert plan.expert.tolist() == [[0], [1], [0]], "the third unit alone would choose 2"
    torch.testing.assert_close(plan.weight[:, 0], torch.tensor([0.7, 0.5, 0.45], dtype=torch.float64))


def test_all_units_are_seen_where_it_is_not_causal() -> None:
    plan = plan_of(by_hand(torch.zeros(3, 3, dtype=torch.float64), causal=False), R)
    torch.testing.assert_close(plan.probs, R.softmax(-1).mean(0).expand(3, 3))


def test_tau_to_infinity_averages_and_tau_to_zero_copies_the_best_match() -> None:
    similarity = torch.tensor([[1, 3, 2], [1, 2, 3], [5, 1, 2]], dtype=torch.float64)
    far = plan_of(by_hand(similarity, causal=False, tau=1e9), R)
    torch.testing.assert_close(far.probs, R.softmax(-1).mean(0).expand(3, 3))
    assert far.expert.unique().numel() == 1
    near = by_hand(similarity, causal=False, tau=1e-3)
    torch.testing.assert_close(probs(near, R), R.softmax(-1)[[1, 2, 0]])
    again = plan_of(near, R, Signals(knobs={"mix_tau": 1e9}))
    torch.testing.assert_close(again.probs, far.probs)


def test_similarities_are_divided_by_the_root_of_the_width() -> None:
    similarity = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = probs(by_hand(similarity, scale="sqrt_dim"), R)
    torch.testing.assert_close(scaled, probs(by_hand(similarity, tau=math.sqrt(3)), R))


def test_identity_start_is_the_inner_product_over_the_root_of_the_width() -> None:
    """W_s = I / sqrt(d): u_i . u_j / sqrt(d), and a parameter of zeros that adds to it."""
    started = Router(mix=SimilarityMix(), weigh=Raw()).build(dim=DIM, num_experts=8)
    drawn = Router(mix=SimilarityMix(start="random"), weigh=Raw()).build(dim=DIM, num_experts=8)
    assert not started.mix.weight.any()
    with torch.no_grad():
        drawn.score.weight.copy_(started.score.weight)
        drawn.mix.weight.copy_(torch.eye(DIM) / DIM**0.5)
    torch.testing.assert_close(probs(started, units(9)), probs(drawn, units(9)))


def test_identity_m_is_the_baseline_exactly() -> None:
    """Outputs, loss and gradients of a layer whose A is the identity equal those of the layer without a mix."""
    made = {}
    for name, mix in (("plain", None), ("mixed", AttentionMix())):
        config = MoELayer(
            num_experts=8, router=Router(mix=mix), experts=Gated(width=8), losses=(SwitchBalance(coefficient=1.0),)
        )
        layer = config.build(dim=DIM)
        with torch.no_grad():
            for i, p in enumerate(layer.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
        x = units(12).requires_grad_()
        y, _, trail = layer(x, Signals(attend=lambda v: v))
        loss = y.square().sum() + trail.loss()
        loss.backward()
        made[name] = [y, loss, x.grad, *(p.grad for p in layer.parameters())]
    for a, b in zip(made["plain"], made["mixed"], strict=True):
        assert torch.equal(a, b)


def test_rows_sum_to_one_and_padding_has_no_influence() -> None:
    valid = torch.ones(24, dtype=torch.bool)
    valid[[0, 1, 6, 7, 20]] = False
    given = signals(24, valid=valid)
    for name in ("similarity-mix", "similarity-mix-top-p", "attention-mix"):
        router = build(name)
        plan = plan_of(router, units(24), given)
        torch.testing.assert_close(plan.probs.sum(1), torch.ones(24))
        loud = plan_of(router, torch.where(valid[:, None], units(24), 40.0), given)
        assert torch.equal(plan.probs[valid], loud.probs[valid]), name


def test_units_see_their_own_segment_only() -> None:
    """Segments one by one, all together as one row, in rows, and packed into one row: the same distributions."""
    for name in ("similarity-mix", "similarity-mix-top-p"):
        router, x = build(name), units(24)
        alone = torch.cat([probs(router, part) for part in x.split(8)])
        for given in (
            signals(24),
            signals(24, rows=3),
            Signals(rows=3),
            signals(24, rows=1),
        ):
            torch.testing.assert_close(probs(router, x, given), alone)
    with pytest.raises(UserError, match="24 units are no 5 rows"):
        build("similarity-mix")(units(24), Signals(rows=5))


def test_changing_a_token_leaves_earlier_distributions_unchanged() -> None:
    router, x = build("similarity-mix"), units(10)
    before = probs(router, x)
    for j in range(10):
        other = x.clone()
        other[j] = -3.0
        after = probs(router, other)
        assert torch.equal(after[:j], before[:j])
        assert not torch.equal(after[j], before[j])


def test_noise_is_averaged_like_the_distribution() -> None:
    """In training the order of selection is A times the noisy distribution; the distribution itself has no noise."""
    swap = Map(torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
    router = build(Router(score=FixedNoise(std=2.0), mix=AttentionMix(), select=TopK(k=1), weigh=Raw()))
    plan = plan_of(router, units(2), Signals(attend=swap, seed=3))
    noisy = swap(plan.extra["noisy_logits"].softmax(-1))
    assert plan.expert[:, 0].tolist() == noisy.argmax(1).tolist()
    torch.testing.assert_close(plan.probs, swap(plan.extra["unmixed_probs"]))
    assert not torch.equal(plan.extra["noisy_logits"], plan.logits)


@pytest.mark.parametrize("name", ["similarity-mix", "attention-mix", "attention-mix-posterior"])
@pytest.mark.parametrize("window", [None, 5])
def test_cached_equals_whole(name: str, window: int | None) -> None:
    """Prompts of unequal length, padded on the left, decoded token by token: the plans of the whole pass."""
    base = models()["moe"]
    moe = MoELayer(num_experts=8, router=build(name).config, experts=Gated(width=8), losses=())
    model = base.replace(
        moe=moe, attention=Attention(num_heads=2, num_kv_heads=1, head_dim=8, window=window), context=16
    ).build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
    model.eval()
    tokens = torch.randint(0, 7, (2, 12), generator=torch.Generator().manual_seed(1))
    place = torch.arange(12) - torch.tensor([[0], [3]])
    keep = frozenset({"probs"})

    def part(start: int, stop: int, carry: Carry | None) -> tuple[list[Plan], Carry]:
        at = place[:, start:stop]
        given = Signals(valid=(at >= 0).reshape(-1), position=at.clamp_min(0).reshape(-1), keep=keep)
        _, carry, trail = model(tokens[:, start:stop], given, carry)
        return list(trail.plans().values()), carry  # type: ignore[arg-type]

    whole, _ = part(0, 12, None)
    carry: Carry | None = model.new_cache(12)
    parts = []
    for start, stop in [(0, 5), (5, 7), *((t, t + 1) for t in range(7, 12))]:
        plans, carry = part(start, stop, carry)
        parts.append(plans)
    seen = (place >= 0)[..., None]
    for layer, plan in enumerate(whole):
        got = torch.cat([p[layer].probs.view(2, -1, 8) for p in parts], dim=1)
        torch.testing.assert_close(got * seen, plan.probs.view(2, 12, 8) * seen, rtol=1e-5, atol=1e-5)


def test_generation_is_that_of_whole_passes() -> None:
    moe = MoELayer(num_experts=8, router=Router(mix=SimilarityMix()), experts=Gated(width=8), losses=())
    model = models()["moe"].replace(moe=moe).build()
    prompt, made = [3, 1, 4, 1, 5], []
    for _ in range(6):
        with torch.no_grad():
            logits = model.eval()(torch.tensor([prompt + made]))[0]
        made.append(int(logits[0, -1].argmax()))
    assert generate(model, prompt, 6).tokens.tolist() == made


@pytest.mark.parametrize(
    ("mix", "kv"),
    [(SimilarityMix(), 4), (AttentionMix(), 4), (AttentionMix(), 2), (AttentionMix(heads="posterior"), 2)],
)
def test_flops_are_those_of_the_operations(mix: Mix, kv: int) -> None:
    """Nine ids in heads of width 4: the attention's kernel is called three times more."""
    moe = MoELayer(num_experts=9, router=Router(mix=mix), experts=Gated(width=8), losses=())
    attention = Attention(num_heads=4, num_kv_heads=kv, head_dim=4)
    model = models()["moe"].replace(moe=moe, attention=attention, context=16).build()
    tokens = torch.randint(0, 7, (2, 16))
    want = cost(model, 16)
    with counter() as count:
        logits = model(tokens)[0]
    assert count.get_total_flops() == 32 * want.flops
    with counter() as count:
        logits.sum().backward()
    assert count.get_total_flops() == 32 * (want.train_flops - want.flops)


class Heads:
    """Two heads: one sees the unit itself, the other the first unit."""

    first = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)

    def __init__(self, added: Tensor) -> None:
        self.added = added

    def __call__(self, v: Tensor, weight: Tensor) -> Tensor:
        return weight[:, :1] * v + weight[:, 1:] * (self.first @ v)

    def contributions(self) -> Tensor:
        return self.added


def test_posterior_of_heads_by_hand() -> None:
    """H_ih = softmax_h(-|u_i - c_i^h|^2 / 2 sigma^2): squared distances 0 and 2 ln 3 sigma^2 give 3/4 and 1/4."""
    sigma = 0.5
    apart = (2 * math.log(3)) ** 0.5 * sigma * torch.tensor([1.0, 0, 0], dtype=torch.float64)
    near, far = R.clone(), R + apart
    router = Router(mix=AttentionMix(heads="posterior", sigma=sigma), weigh=Raw(), select=TopK(k=1))
    made = router.build(dim=3, num_experts=3).double()
    with torch.no_grad():
        made.score.weight.copy_(torch.eye(3))
    own, first = R.softmax(-1), R.softmax(-1)[:1]
    for heads, share in (((near, far), 0.75), ((far, near), 0.25), ((far, far), 0.5)):
        found = probs(made, R, Signals(attend=Heads(torch.stack(heads, 1))))  # type: ignore[arg-type]
        torch.testing.assert_close(found, share * own + (1 - share) * first)
    far_off = router.replace(mix=AttentionMix(heads="posterior", sigma=1e6)).build(dim=3, num_experts=3).double()
    far_off.load_state_dict(made.state_dict())
    found = probs(far_off, R, Signals(attend=Heads(torch.stack((near, far), 1))))  # type: ignore[arg-type]
    torch.testing.assert_close(found, 0.5 * own + 0.5 * first)
    with pytest.raises(UserError, match="knows its heads"):
        made(R, Signals(attend=lambda v: v))


def test_posterior_weights_are_causal_and_learn() -> None:
    """In a decoder: a changed token leaves earlier choices alone, and gradients reach the attention's output map."""
    router = build("attention-mix-posterior").config
    moe = MoELayer(num_experts=8, router=router, experts=Gated(width=8), losses=())
    model = models()["moe"].replace(moe=moe).build()
    tokens = torch.arange(12)[None] % 7
    other = tokens.clone()
    other[0, 8] = 30
    keep = Signals(keep=frozenset({"probs"}))
    plans = [list(model(t, keep)[2].plans().values()) for t in (tokens, other)]
    for a, b in zip(*plans, strict=True):
        assert torch.equal(a.probs[:8], b.probs[:8])
        assert not torch.equal(a.probs[8:], b.probs[8:])
    plans[0][0].probs[:, 0].sum().backward()
    assert model.layers[0].mixer.o.weight.grad.abs().sum() > 0


def test_weights_of_logits_are_refused() -> None:
    for weigh in (SoftmaxKept(), NearBest()):
        with pytest.raises(UserError, match="mix does not change"):
            Router(mix=AttentionMix(), weigh=weigh)


def test_gradients_reach_s_and_r() -> None:
    router = build("similarity-mix").double()
    x = units(5, dtype=torch.float64).requires_grad_()
    leaves = (x, router.mix.weight, router.score.weight)
    assert torch.autograd.gradcheck(lambda *_: weights(router(x)[0]), leaves, atol=1e-6)
