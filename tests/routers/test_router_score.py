"""Score steps, each against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.core.account import cost
from moestro.core.draws import fold, normal, uniform
from moestro.core.errors import UserError
from moestro.core.params import describe
from moestro.core.signals import Signals
from moestro.nn.init import initialise
from moestro.routers import MLP, Cosine, FixedNoise, Jitter, Linear, Noisy, Raw, Router, Score, TopK, Uniform
from moestro.routers.order import highest
from routers.router_cases import DIM, EXAMPLES, E, build, signals, units


def logits(score: Score, x: list[list[float]], experts: int, values: dict[str, list], train: bool = False):
    router = Router(score=score, weigh=Raw(), select=TopK(k=1)).build(dim=len(x[0]), num_experts=experts).train(train)
    router.score.load_state_dict({k: torch.tensor(v) for k, v in values.items()})
    return router(torch.tensor(x), Signals(seed=7))[0].logits, router


def test_linear() -> None:
    got, _ = logits(Linear(bias=True), [[1.0, 2.0]], 3, {"weight": [[1.0, 0], [0, 1], [2, -1]], "bias": [0.5, 0, -1]})
    assert got.tolist() == [[1.5, 2.0, -1.0]]


def test_the_start_of_a_linear_gate() -> None:
    """13: a gate that begins with N(0, 1) on 768 inputs is near one-hot; the model's own start is not."""
    x = torch.randn(200, 768, generator=torch.Generator().manual_seed(0))
    for std, want in ((None, 1 / math.sqrt(768)), (1.0, 1.0)):
        router = Router(score=Linear(init_std=std)).build(dim=768, num_experts=8)
        initialise(router, 1, None)
        assert router.score.weight.std().item() == pytest.approx(want, rel=0.05)
        best = router(x, Signals())[0].probs.amax(1).mean()
        assert (best > 0.95) == (std == 1.0)
    with pytest.raises(UserError, match="init_std must be positive"):
        Linear(init_std=0.0)


def test_mlp() -> None:
    values = {
        "hidden.0.weight": [[1.0, 1.0], [1.0, -1.0]],
        "hidden.0.bias": [0.0, 0.5],
        "hidden.1.weight": [[2.0, 0.0], [0.0, 1.0]],
        "hidden.1.bias": [-1.0, 0.0],
        "out.weight": [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]],
    }
    got, _ = logits(MLP(hidden=2, depth=2, activation="relu"), [[1.0, 2.0]], 3, values)
    assert got.tolist() == [[5.0, 0.0, 5.0]]  # (3, -0.5) -> (3, 0) -> (5, 0)


def test_cosine() -> None:
    values = {"prototypes": [[2.0, 0.0], [0.0, 5.0], [-1.0, -1.0]]}
    got, _ = logits(Cosine(scale=4.0, learned_scale=False), [[3.0, 4.0]], 3, values)
    torch.testing.assert_close(got, torch.tensor([[2.4, 3.2, -4 * 7 / (5 * math.sqrt(2))]]))
    low, _ = logits(
        Cosine(rank=1, scale=4.0, learned_scale=False),
        [[3.0, 4.0]],
        2,
        {"prototypes": [[2.0], [-7.0]], "projection": [[1.0, 0]]},
    )
    torch.testing.assert_close(low, torch.tensor([[4.0, -4.0]]))


def test_the_learned_scale_is_bounded() -> None:
    values = {"prototypes": [[1.0, 0.0], [0.0, 1.0]]}
    warm, router = logits(Cosine(scale=2.0, max_scale=6.0), [[1.0, 0.0]], 2, {**values, "log_scale": [math.log(1.5)]})
    torch.testing.assert_close(warm, torch.tensor([[3.0, 0.0]]))
    hot, _ = logits(Cosine(scale=2.0, max_scale=6.0), [[1.0, 0.0]], 2, {**values, "log_scale": [50.0]})
    torch.testing.assert_close(hot, torch.tensor([[6.0, 0.0]]))
    router(torch.tensor([[1.0, 0.5]]))[0].logits.sum().backward()
    assert router.score.log_scale.grad.abs() > 0


def test_frozen_passes_gradient_to_x_only() -> None:
    router = build("frozen")
    before = {n: t.clone() for n, t in router.state_dict().items()}
    assert set(before) == {"score.inner.weight", "score.inner.bias"}
    x = units(20).requires_grad_()
    plan, _ = router(x)
    plan.weight.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert [p for p in router.parameters() if p.requires_grad] == []
    assert all(torch.equal(t, before[n]) for n, t in router.state_dict().items())


def test_learned_noise() -> None:
    config = Router(score=Noisy(floor=0.01), select=TopK(k=2))
    router = build(config)
    with torch.no_grad():
        router.score.noise.zero_()
    x, given = units(50), signals(50)
    plan, _ = router(x, given)
    torch.testing.assert_close(plan.extra["noise_std"], torch.full((50, E), math.log(2) + 0.01))
    draw = normal(given.at("score").seed, torch.arange(50), E)
    torch.testing.assert_close(plan.extra["noisy_logits"], plan.logits + (math.log(2) + 0.01) * draw)
    torch.testing.assert_close(plan.logits, x @ router.score.inner.weight.t())
    torch.testing.assert_close(plan.probs, plan.logits.softmax(-1))
    assert torch.equal(plan.expert, highest(plan.extra["noisy_logits"].softmax(-1), 2))
    assert not torch.equal(plan.expert, highest(plan.probs, 2))
    calm, _ = router.eval()(x, given)
    assert not calm.extra
    assert torch.equal(calm.expert, highest(plan.probs, 2))


def test_learned_noise_takes_gradient_from_a_load_loss_only() -> None:
    router = build("noisy")
    plan, _ = router(units(30), signals(30))
    assert torch.autograd.grad(plan.weight.sum(), router.score.noise, allow_unused=True, retain_graph=True)[0] is None
    smooth = ((plan.logits - plan.extra["noisy_logits"].detach()) / plan.extra["noise_std"]).sum()
    assert torch.autograd.grad(smooth, router.score.noise)[0].abs().sum() > 0


def test_fixed_noise_is_one_over_experts_unless_told() -> None:
    plan, _ = build(Router(score=FixedNoise()))(units(10), signals(10))
    assert plan.extra["noise_std"].unique().tolist() == [1 / E]
    plan, _ = build(Router(score=FixedNoise(std=2.5)))(units(10), signals(10))
    assert plan.extra["noise_std"].unique().tolist() == [2.5]


def test_noise_is_standard_normal_and_new_with_every_seed() -> None:
    router = build(Router(score=FixedNoise(std=1.0)))
    a, b = (router(units(2000), signals(2000, seed=s))[0] for s in (1, 2))
    draw = (a.extra["noisy_logits"] - a.logits).detach()
    assert draw.mean().abs() < 0.03
    assert (draw.std() - 1).abs() < 0.03
    assert (a.extra["noisy_logits"] != b.extra["noisy_logits"]).float().mean() > 0.99


def test_jitter_multiplies_what_is_scored() -> None:
    x, weight = [[1.0, 2.0], [3.0, -1.0]], {"inner.weight": [[1.0, 0], [0, 1], [2, -1]]}
    got, router = logits(Jitter(noise=0.25), x, 3, weight, train=True)
    draw = uniform(fold(7, "score"), torch.arange(2), 2)
    factor = 0.75 + 0.5 * draw
    want = (torch.tensor(x) * factor) @ torch.tensor(weight["inner.weight"]).T
    torch.testing.assert_close(got, want)
    assert bool((got != router.eval()(torch.tensor(x), Signals(seed=7))[0].logits).all(-1).all())
    assert logits(Jitter(noise=0.25), x, 3, weight)[0].tolist() == [[1.0, 2.0, 0.0], [3.0, -1.0, 7.0]]
    with pytest.raises(UserError, match="Jitter.noise"):
        Jitter(noise=1.0)


def test_uniform_has_no_parameters() -> None:
    plan, _ = Router(score=Uniform()).build(dim=4, num_experts=5)(torch.randn(3, 4))
    assert plan.probs.unique().tolist() == [pytest.approx(0.2)]
    assert plan.expert.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("name", EXAMPLES)
def test_parameters_are_described_and_flops_counted(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    router = EXAMPLES[name].build(dim=DIM, num_experts=E)
    assert {info.role for info in describe(router).values()} <= {"router"}
    with FlopCounterMode(display=False) as counter:
        router(units(3), signals(3))
    assert counter.get_total_flops() == 3 * cost(router, 3).flops
    assert cost(router).params == sum(p.numel() for p in router.parameters())
