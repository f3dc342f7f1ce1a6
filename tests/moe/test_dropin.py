"""The drop-in FFN: y alone, losses on y's gradient, plans seen through `collect`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import moestro
from moestro.core.errors import MissingSignalError, RecomputationError, UserError
from moestro.core.signals import Signals
from moestro.core.trail import Key
from moestro.experts import Gated
from moestro.experts.modules import ModuleBank
from moestro.losses.config import SequenceBalance, SwitchBalance, ZLoss
from moestro.moe import MoELayer
from moestro.moe.carrier import ride
from moestro.moe.dropin import MoE, collect, default_width, step
from moestro.moe.layer import MoELayer as Layer
from moestro.routers import config as routers
from moestro.testing.compare import assert_close
from moestro.testing.routers import signals_for

D, E, B, S = 12, 4, 3, 6
CONFIG = MoELayer(num_experts=E, experts=Gated(width=10), losses=(SwitchBalance(coefficient=0.3), ZLoss(coefficient=2)))


def tokens(seed: int = 1, batch: int = B) -> Tensor:
    return torch.randn(batch, S, D, generator=torch.Generator().manual_seed(seed))


def build(config: MoELayer = CONFIG, **changes: Any) -> MoE:
    torch.manual_seed(0)
    made = MoE(D, config=config, **changes)
    nn.init.normal_(made.router.score.weight, std=0.5)
    return made


def grads(module: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def explicit(moe: MoE, x: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
    """Gradients of main loss + factor * losses, with the losses added by hand."""
    y, _, trail = Layer.forward(moe, x)
    (y.square().sum() + factor * trail.loss()).backward()
    return grads(moe)


def compare(got: dict[str, Tensor], want: dict[str, Tensor], tol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert_close(name, got[name], grad, tol=tol)


# Construction ------------------------------------------------------------------------------------------------------


def test_in_ten_lines() -> None:
    moe = moestro.MoE(D, num_experts=4, top_k=2)
    x = tokens().requires_grad_()
    y = moe(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None for p in moe.parameters())
    assert set(moe.state_dict()) == {"router.score.weight", "experts.gate_up", "experts.down"}
    assert tuple(moe.experts.down.shape) == (4, D, default_width(D))


def test_one_expert_per_unit_still_teaches_the_router() -> None:
    moe = build(MoE(D, num_experts=4, top_k=1).config.replace(losses=()))
    moe(tokens()).square().sum().backward()
    assert bool(moe.router.score.weight.grad.any())


@pytest.mark.parametrize(("dim", "width"), [(12, 32), (64, 176), (100, 272), (4096, 10928), (1, 8)])
def test_default_width_has_the_parameters_of_a_plain_ffn(dim: int, width: int) -> None:
    assert default_width(dim) == width
    assert width % 8 == 0
    assert 0 <= 3 * dim * width - 2 * dim * 4 * dim < 3 * dim * 8


def test_clear_errors() -> None:
    with pytest.raises(UserError, match="top_k 3 is not in"):
        MoE(D, num_experts=2, top_k=3)
    with pytest.raises(UserError, match="either config or"):
        MoE(D, 4, config=CONFIG)
    with pytest.raises(UserError, match=r"no moestro\.MoE layer"), collect(nn.Linear(2, 2)):
        pass
    with pytest.raises(MissingSignalError, match="segment"):
        build(CONFIG.replace(losses=(SequenceBalance(),)))(tokens())


def test_signals_and_ready_experts() -> None:
    moe = build(CONFIG.replace(losses=(SequenceBalance(),)), experts=ModuleBank(lambda e: nn.Linear(D, D), D, E))
    moe(tokens(), signals=signals_for(B, S)).sum().backward()
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[:, -2:] = False
    y = moe(tokens(), valid, signals=signals_for(B, S))
    assert not y[~valid].any()
    assert bool(y[valid].any())


# The carrier -------------------------------------------------------------------------------------------------------


def test_the_ride_leaves_y_alone_and_hands_the_loss_its_factor() -> None:
    y, parameter = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = ride(y, parameter**2, 0.5)
    assert torch.equal(out, y)
    (out * 3).sum().backward()
    assert torch.equal(y.grad, torch.full((3,), 3.0))
    assert float(parameter.grad) == 0.5 * 4.0
    assert ride(y, 0.0) is y
    assert ride(y, parameter.detach()) is y
    with torch.no_grad():
        assert ride(y, parameter) is y


def test_a_loss_rides_on_half_precision() -> None:
    y, parameter = torch.randn(3, dtype=torch.bfloat16, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    ride(y, parameter * 1.001, 1.0).sum().backward()
    assert y.grad.dtype == torch.bfloat16
    assert_close("loss gradient", parameter.grad, torch.tensor(1.001), tol=1e-6)


def test_carried_gradients_equal_those_of_an_added_loss() -> None:
    moe, x = build(), tokens()
    want = explicit(moe, x)
    moe(x).square().sum().backward()
    compare(grads(moe), want)
    without = build(CONFIG.replace(losses=()))
    without.load_state_dict(moe.state_dict())
    without(x).square().sum().backward()
    assert not torch.allclose(grads(without)["router.score.weight"], want["router.score.weight"], rtol=1e-3)


@pytest.mark.parametrize("scale", [0.25, 1024.0])
def test_loss_scale_follows_the_main_loss(scale: float) -> None:
    moe, x = build(loss_scale=scale), tokens()
    want = {n: scale * g for n, g in explicit(moe, x).items()}
    (scale * moe(x).square().sum()).backward()
    compare(grads(moe), want)


def test_accumulation_is_the_mean_over_micro_batches() -> None:
    moe, parts = build(), [tokens(seed) for seed in range(4)]
    want: dict[str, Tensor] = {}
    for x in parts:
        want = {n: g / 4 + want.get(n, 0) for n, g in explicit(moe, x).items()}
    moe.loss_scale = 1 / 4
    for x in parts:
        (moe(x).square().sum() / 4).backward()
    compare(grads(moe), want)


def test_two_layers_carry_each_their_own() -> None:
    a, b, x = build(), build(), tokens()
    y, _, first = Layer.forward(a, x)
    z, _, second = Layer.forward(b, y)
    (z.square().sum() + first.loss() + second.loss()).backward()
    want = {**{f"a.{n}": g for n, g in grads(a).items()}, **{f"b.{n}": g for n, g in grads(b).items()}}
    b(a(x)).square().sum().backward()
    got = {**{f"a.{n}": g for n, g in grads(a).items()}, **{f"b.{n}": g for n, g in grads(b).items()}}
    compare(got, want)


def test_recomputation_carries_the_loss_once() -> None:
    moe, x = build(), tokens()
    want = explicit(moe, x)
    for save in (
        lambda: moestro.checkpoint(moe, x),
        lambda: torch_checkpoint(moe, x, use_reentrant=False, context_fn=moestro.checkpoint_context),
    ):
        save().square().sum().backward()
        compare(grads(moe), want)


def test_checkpoints_that_save_no_choices_are_refused() -> None:
    moe, x = build(), tokens()
    y = torch_checkpoint(moe, x, use_reentrant=False)
    with pytest.raises(RecomputationError, match="moestro.checkpoint_context"):
        y.sum().backward()
    y = torch_checkpoint(moe, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(RecomputationError, match="moestro.checkpoint_context"):
        y.sum().backward()


def test_nothing_rides_in_evaluation() -> None:
    moe, x = build(), tokens().requires_grad_()
    moe.eval()
    y, _, _ = Layer.forward(moe, x)
    y.square().sum().backward()
    want = grads(moe)
    moe(x).square().sum().backward()
    compare(grads(moe), want)
    moe.train()
    with torch.no_grad():
        assert not moe(x).requires_grad


def test_gradient_reaches_the_losses_when_only_the_router_learns() -> None:
    moe = build()
    moe.experts.requires_grad_(False)
    want = explicit(moe, tokens())
    assert set(want) == {"router.score.weight"}
    moe(tokens()).square().sum().backward()
    compare(grads(moe), want)


def test_deep_copies_carry_their_own_losses() -> None:
    moe = build()
    other = copy.deepcopy(moe)
    other(tokens()).square().sum().backward()
    assert not grads(moe)
    compare(grads(other), explicit(moe, tokens()))


# collect -----------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Two drop-in layers inside somebody else's model, the second under checkpointing on request."""

    def __init__(self, config: MoELayer = CONFIG, save: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(D), build(config))
        self.second = build(config)
        self.save = save

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + (moestro.checkpoint(self.second, x) if self.save else self.second(x))


def test_collect_sees_every_layer_by_path() -> None:
    model = Stack()
    with collect(model) as seen:
        model(tokens())
    assert set(seen.trail) == {Key("first.1", 0), Key("second", 0)}
    record = seen.trail["second"]
    assert int(record.demand.sum()) == B * S * 2
    assert not record.plan.weight.requires_grad
    assert not any(v.requires_grad for v in seen.trail.losses().values())
    assert record.plan.probs is None
    _, _, want = Layer.forward(model.first[1], model.first[0](tokens()))
    assert torch.equal(seen.trail["first.1"].plan.expert, want[""].plan.expert)
    assert_close("loss", torch.as_tensor(seen.trail.loss() * 1.0), sum(_losses(model)), tol=1e-6)


def _losses(model: Stack) -> list[Tensor]:
    x = tokens()
    y, _, a = Layer.forward(model.first[1], model.first[0](x))
    _, _, b = Layer.forward(model.second, x + y)
    return [a.loss().detach(), b.loss().detach()]


def test_nothing_is_left_behind() -> None:
    model = Stack()
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    with pytest.raises(RuntimeError), collect(model, keep=["probs"]):
        model(torch.randn(B, S, D + 1))
    with collect(model, keep=["probs"]) as seen:
        model(tokens())
    model(tokens())
    assert len(seen.trail) == 2
    for n, m in model.named_modules():
        assert m.__dict__.keys() == before[n].keys()
        assert not m._forward_hooks
        assert not m._forward_pre_hooks


def test_every_genuine_forward_is_a_pass() -> None:
    model = Stack()
    with collect(model) as seen:
        model(tokens(1))
        first = seen.trail[Key("second", 0)]
        model(tokens(2))
        model.second(tokens(3))
    assert sorted(seen.trail) == [Key("first.1", 0), Key("first.1", 1), *(Key("second", i) for i in range(3))]
    assert seen.trail[Key("second", 0)] is first
    assert torch.equal(seen.counts()["second"], sum(seen.trail[Key("second", i)].demand for i in range(3)))
    with collect(model) as seen:
        model(tokens())
        seen.clear()
        model(tokens())
    assert set(seen.trail) == {Key("first.1", 0), Key("second", 0)}


def test_recomputation_writes_nothing() -> None:
    model = Stack(save=True)
    with collect(model) as seen:
        model(tokens()).square().sum().backward()
        model(tokens(2)).square().sum().backward()
    plain = Stack()
    plain.load_state_dict(model.state_dict())
    with collect(plain) as want:
        plain(tokens())
        plain(tokens(2))
    assert seen.trail.keys() == want.trail.keys()
    for path, count in want.counts().items():
        assert torch.equal(seen.counts()[path], count)


def test_evaluation_is_seen_but_not_counted() -> None:
    model = Stack()
    with collect(model) as seen:
        model(tokens())
        model.eval()
        with torch.no_grad():
            model(tokens(2))
    assert len(seen.trail) == 4
    assert torch.equal(seen.counts()["second"], seen.trail[Key("second", 0)].demand)


def test_two_collectors_do_not_disturb_each_other() -> None:
    model = Stack()
    with collect(model, keep=["probs"]) as outer:
        model(tokens())
        with collect(model.second) as inner:
            model(tokens(2))
    assert set(inner.trail) == {Key("", 0)}
    assert len(outer.trail) == 4
    assert outer.trail[Key("second", 1)].plan.probs is not None
    assert torch.equal(inner.trail[""].demand, outer.trail[Key("second", 1)].demand)


def test_keep_holds_on_to_probabilities() -> None:
    model = Stack()
    with collect(model, keep=["probs"]) as seen:
        y = model(tokens())
    assert seen.trail["second"].plan.probs.shape == (B * S, E)
    assert seen.trail["second"].plan.logits is None
    assert torch.equal(y, model(tokens()))


def test_step_moves_loss_free_routers_by_training_counts() -> None:
    config = CONFIG.replace(router=routers.Router(select=routers.LossFree(inner=routers.TopK(k=2))), losses=())
    model = Stack(config)
    with collect(model) as seen:
        model(tokens())
        model.eval()
        model(tokens(5))
    step(model, seen)
    for path, layer in (("first.1", model.first[1]), ("second", model.second)):
        count = seen.trail[Key(path, 0)].demand
        want = layer.router.select.rate * (count.sum() - E * count).sign()
        assert_close(f"bias of {path}", layer.router.select.bias, want.float(), tol=1e-6)
    with pytest.raises(UserError, match="did you mean 'second'"):
        step(model, {"secnd": torch.zeros(E, dtype=torch.int64)})


def test_padding_is_not_counted() -> None:
    moe = build()
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[0] = False
    with collect(moe) as seen:
        moe(tokens(), valid)
    assert int(seen.trail[""].demand.sum()) == 2 * (B - 1) * S


def test_seeds_move_draws() -> None:
    moe = build(CONFIG.replace(router=routers.Router(select=routers.Random(k=2)), losses=()))
    with collect(moe) as seen:
        for seed in (0, 0, 1):
            moe(tokens(), signals=Signals(seed=seed, unit_id=torch.arange(B * S)))
    plans = [seen.trail[Key("", i)].plan.expert for i in range(3)]
    assert torch.equal(plans[0], plans[1])
    assert not torch.equal(plans[0], plans[2])
