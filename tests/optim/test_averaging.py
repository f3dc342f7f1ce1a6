"""Experts weights averaging (48): the mean stays, deviations shrink by the published factor, the share rises."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import UserError
from moestro.experts import Gated, Modules
from moestro.moe.config import AveragedExperts, MoELayer
from moestro.optim import ExpertAveraging
from moestro.optim.averaging import average_


def experts(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.75])
def test_a_step_is_that_of_the_paper(share: float) -> None:
    before, after = experts(), experts()
    average_(after, share)
    for i in range(4):
        others = sum(before[j] for j in range(4) if j != i)
        want = (1 - share) * before[i] + share / 3 * others
        assert torch.allclose(after[i], want, rtol=0, atol=1e-12)
    assert torch.allclose(after.mean(0), before.mean(0), rtol=0, atol=1e-12)
    shrunk = (after - after.mean(0)) - (1 - share * 4 / 3) * (before - before.mean(0))
    assert shrunk.abs().max() < 1e-12


def test_the_largest_share_makes_all_experts_equal_at_once() -> None:
    stack = experts()
    average_(stack, 3 / 4)
    assert (stack - stack[:1]).abs().max() < 1e-12
    one = experts(1)
    average_(one, 0.5)
    assert torch.equal(one, experts(1))


def test_the_share_rises_in_a_straight_line_and_ends_early_where_told() -> None:
    linear = ExpertAveraging(share=0.4)
    assert [round(linear.at(s, 5), 6) for s in range(5)] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert [ExpertAveraging(share=0.4, rise="constant").at(s, 3) for s in range(3)] == [0.4] * 3
    early = ExpertAveraging(share=0.4, until=0.5)
    assert [round(early.at(s, 6), 6) for s in range(6)] == [0.0, 0.2, 0.4, 0.0, 0.0, 0.0]


def test_the_hook_moves_banks_only_and_refuses_models_without_them() -> None:
    layer = MoELayer(num_experts=3, experts=Gated(width=8), shared=Gated(width=4)).build(dim=6)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    hook = ExpertAveraging(share=2 / 3, rise="constant").build(layer, 10)
    hook(0, {})
    for name, p in layer.named_parameters():
        if name.startswith("experts."):
            assert torch.allclose(p, before[name].mean(0).expand_as(p), atol=1e-6)
        else:
            assert torch.equal(p, before[name])
    with pytest.raises(UserError, match="no routed experts"):
        ExpertAveraging().build(torch.nn.Linear(2, 2), 10)
    for odd in (Gated(width=(4, 6, 8)), Modules()):
        with pytest.raises(UserError, match="experts that are not"):
            ExpertAveraging().build(MoELayer(num_experts=3, experts=odd).build(dim=6), 10)


@pytest.mark.parametrize("wrong", [{"share": 1.0}, {"share": -0.1}, {"until": 0.0}])
def test_shares_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="must lie in"):
        ExpertAveraging(**wrong)


def test_the_layer_deals_in_training_and_shows_the_mean_in_evaluation() -> None:
    layer = AveragedExperts(experts=Gated(width=8)).build(dim=6)
    x = torch.randn(2, 9, 6)
    layer.train()
    _, _, trail = layer(x)
    (record,) = trail.records.values()
    assert sorted(record.load.tolist()) == [4, 4, 5, 5]
    layer.eval()
    mean = Gated(width=8).build(dim=6, num_experts=1)
    mean.load_state_dict({n: p.mean(0, keepdim=True) for n, p in layer.experts.named_parameters()})
    plain = MoELayer(num_experts=1, experts=Gated(width=8), router=layer.config.router, losses=()).build(dim=6).eval()
    plain.experts.load_state_dict(mean.state_dict())
    assert torch.allclose(layer(x)[0], plain(x)[0], rtol=0, atol=1e-6)


def test_equal_experts_are_the_dense_layer_whoever_is_dealt_where() -> None:
    layer = AveragedExperts(experts=Gated(width=8)).build(dim=6)
    with torch.no_grad():
        for p in layer.experts.parameters():
            p.copy_(p[:1].expand_as(p).clone())
    x = torch.randn(3, 5, 6)
    assert torch.allclose(layer.train()(x)[0], layer.eval()(x)[0], rtol=0, atol=1e-6)


def test_compute_is_that_of_the_dense_layer() -> None:
    from moestro.nn.config import FeedForward

    layer = AveragedExperts(experts=Gated(width=8))
    assert layer.flops_per_token(1, dim=6) == FeedForward(width=8).flops_per_token(1, dim=6)
    with pytest.raises(UserError, match="one width"):
        AveragedExperts(experts=Gated(width=(2, 3, 4, 5)))
