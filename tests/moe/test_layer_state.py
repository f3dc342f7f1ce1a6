"""The routed layer: losses, trails, accounting, saving, casting, copying."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from moestro.core.config import Config
from moestro.core.errors import MissingSignalError, UserError
from moestro.core.params import describe
from moestro.core.signals import Signals
from moestro.dispatch import Capacity
from moestro.experts import MLP, Gated, Modules
from moestro.experts.modules import ModuleBank
from moestro.losses.config import SequenceBalance, SwitchBalance, ZLoss
from moestro.moe import GateMerge, MoELayer
from moestro.ops.choice import checkpoint
from moestro.routers import config as routers
from moestro.routers.examples import examples as router_examples
from moestro.testing.compare import assert_close
from moestro.testing.routers import signals_for

from .layer_cases import B, D, E, S, T, build, tokens

# Losses, trails, accounting ----------------------------------------------------------------------------------------


def test_the_trail_has_counts_losses_and_a_slim_plan() -> None:
    layer = build(losses=(SwitchBalance(coefficient=0.5), ZLoss(coefficient=0.25)))
    _, _, trail = layer(tokens())
    assert [(*k,) for k in trail] == [("", 0)]
    assert trail[""].plan.probs is None
    values = {k.name: v for k, v in trail.losses().items()}
    assert len(values) == 2
    first, second = values.values()
    assert_close("loss", torch.as_tensor(trail.loss()), 0.5 * first + 0.25 * second, tol=1e-6)
    _, _, trail = layer(tokens(), Signals(keep=frozenset({"probs"})))
    assert trail[""].plan.probs.shape == (T, E)
    assert trail[""].plan.logits is None


def test_a_loss_without_its_signal_says_so_in_training_only() -> None:
    layer = build(losses=(SequenceBalance(),))
    with pytest.raises(MissingSignalError, match=r"segment.*Signals\(segment="):
        layer(tokens())
    layer.eval()
    assert not layer(tokens())[2].terms()
    assert layer(tokens(), signals_for(B, S))[2].terms()


def test_accumulated_statistics_give_the_loss_of_the_whole_batch() -> None:
    """Balance over micro-batches: sums of statistics, and each part's own gradient."""
    layer = build()
    x = tokens().reshape(T, D)
    _, _, whole = layer(x)
    whole.loss().backward()
    want = layer.router.score.weight.grad.clone()
    layer.zero_grad()
    parts = [layer(part)[2] for part in x.split(T // 3)]
    from moestro.core.trail import add_stats

    totals = add_stats({k: t.stats for k, t in p.terms().items()} for p in parts)
    for part in parts:
        part.within(totals).loss().backward()
    assert_close("router gradient", layer.router.score.weight.grad, want)


def test_checkpointing_gives_equal_gradients_and_no_second_routing() -> None:
    layer = build(router=router_examples()["capacity"], shared=Gated(width=4))
    results = []
    for save in (False, True):
        layer.zero_grad()
        x = tokens().requires_grad_()
        y, _, trail = checkpoint(layer, x) if save else layer(x)
        (y.square().sum() + trail.loss()).backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("config", "met"),
    [
        (MoELayer(num_experts=6, experts=Gated(width=5)), 2),
        (MoELayer(num_experts=6, experts=Gated(width=5), router=routers.Router(select=routers.TopK(k=5))), 5),
        (
            MoELayer(
                num_experts=3, experts=MLP(width=5, bias=True), router=routers.Router(select=routers.All()), losses=()
            ),
            3,
        ),
        (MoELayer(num_experts=5, shared=Gated(width=9), merge=GateMerge(), experts=Gated(width=4)), 2),
        (MoELayer(num_experts=5, experts=Modules(), router=routers.Router(score=routers.MLP(hidden=7))), 2),
    ],
)
def test_accounting_equals_what_was_allocated_and_multiplied(config: MoELayer, met: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    dim, units = 11, 30
    layer = config.build(dim)
    counted = layer.cost()
    assert layer.expected_k() == met
    assert config.num_params(dim=dim) == counted.params == sum(p.numel() for p in layer.parameters())
    expert = sum(p.numel() for p in layer.experts.parameters())
    assert (
        config.num_active_params(dim=dim)
        == counted.active
        == counted.params - expert + round(expert * met / config.num_experts)
    )
    with FlopCounterMode(display=False) as flops:
        layer(torch.randn(units, dim))
    assert config.flops_per_token(1, dim=dim) * units == counted.flops * units == flops.get_total_flops()


def test_expected_k_of_virtual_ids_and_subsets() -> None:
    null = routers.Router(select=routers.TopK(k=2), virtual=("null", "null"))
    assert MoELayer(num_experts=6, router=null).build(D).expected_k() == 2 * 6 / 8
    some = routers.Router(select=routers.TopK(k=2), subset=(0, 2, 4))
    assert MoELayer(num_experts=6, router=some).build(D).expected_k() == 2
    chosen = routers.Router(select=routers.ExpertChoiceSelect(capacity_factor=1.5), weigh=routers.Raw())
    assert MoELayer(num_experts=6, router=chosen).build(D).expected_k() == 1.5


# Structure ---------------------------------------------------------------------------------------------------------


def test_parameter_names_do_not_depend_on_the_exchange() -> None:
    names = {"router.score.weight", "experts.gate_up", "experts.down"}
    assert set(build().state_dict()) == names
    assert set(build(exchange=Capacity(inner=Capacity())).state_dict()) == names
    layer = build(shared=Gated(width=4), merge=GateMerge())
    assert set(layer.state_dict()) == names | {"shared.gate_up", "shared.down", "shared_gate.weight"}
    roles = {n: i.role for n, i in describe(layer).items()}
    assert roles["experts.down"] == "expert"
    assert roles["router.score.weight"] == "router"
    assert roles["shared.down"] == roles["shared_gate.weight"] == "shared_expert"


def test_save_and_load() -> None:
    layer, other = build(), MoELayer(num_experts=E, experts=Gated(width=10)).build(D)
    assert not torch.equal(other(tokens())[0], layer(tokens())[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(tokens())[0], layer(tokens())[0])


def test_deep_copies_use_their_own_experts() -> None:
    layer = build(shared=Gated(width=4))
    other = copy.deepcopy(layer)
    want = layer(tokens())[0]
    with torch.no_grad():
        other.experts.down.zero_()
        other.shared.down.zero_()
    assert torch.equal(layer(tokens())[0], want)
    assert not other(tokens())[0].any()


def test_another_bank_in_its_place_is_used() -> None:
    """What adapters and sharding do: put something else where the experts were."""
    layer = build(exchange=Capacity(), router=router_examples()["capacity"])
    layer.experts = ModuleBank(lambda e: nn.Linear(D, D), D, E)
    with torch.no_grad():
        for p in layer.experts.parameters():
            p.zero_()
    assert not layer(tokens())[0].any()


def test_layers_can_be_pickled() -> None:
    layer = build(shared=Gated(width=4))
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(tokens())[0], layer(tokens())[0])
    assert again.exchange.inner.owner is again


def test_meta_device_then_real() -> None:
    with torch.device("meta"):
        layer = MoELayer(num_experts=E, shared=Gated(width=4), experts=Gated(width=10)).build(D)
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    real = build(shared=Gated(width=4))
    layer.load_state_dict(real.state_dict())
    assert torch.equal(layer(tokens())[0], real(tokens())[0])


@pytest.mark.parametrize("shared", [None, Gated(width=4)])
def test_autocast_runs_experts_in_bf16_and_the_router_in_fp32(shared: Any) -> None:
    layer = build(shared=shared)
    x = tokens().requires_grad_()
    exact, _, want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, _, trail = layer(x, Signals(keep=frozenset({"logits"})))
    assert y.dtype == torch.bfloat16
    assert trail[""].plan.logits.dtype == trail[""].plan.weight.dtype == torch.float32
    assert torch.equal(trail[""].plan.expert, want[""].plan.expert)
    assert_close("y", y, exact, tol=2e-2)
    (y.float().square().sum() + trail.loss()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_a_bf16_layer() -> None:
    layer = build().to(torch.bfloat16)
    x = tokens().bfloat16().requires_grad_()
    y, _, trail = layer(x)
    assert y.dtype == torch.bfloat16
    (y.float().square().sum() + trail.loss()).backward()
    assert bool(torch.isfinite(layer.experts.down.grad).all())


def test_counts_step_the_router() -> None:
    layer = build(router=router_examples()["loss-free"])
    counts = torch.arange(E)
    layer.step(counts)
    assert bool(layer.router.select.bias.any())
    before = layer.router.select.bias.clone()
    _, _, trail = layer(tokens())
    assert torch.equal(layer.router.select.bias, before)
    assert torch.equal(trail.counts()[""], trail[""].demand)
    assert build().step(counts) is None


def test_a_ready_bank_in_place_of_the_configured_one() -> None:
    bank = ModuleBank([nn.Linear(D, D) for _ in range(E)])
    layer = MoELayer(num_experts=E).build(D, experts=bank)
    assert layer(tokens())[0].shape == (B, S, D)
    assert "experts.0.weight" in layer.state_dict()
    with pytest.raises(UserError, match="bank of 8 experts where num_experts is 4"):
        MoELayer(num_experts=4).build(D, experts=bank)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoELayer(num_experts=0), "at least 1"),
        (lambda: MoELayer(unit_axes=0), "at least 1"),
        (lambda: MoELayer(num_experts=1).build(8), "top_k 2"),
        (lambda: MoELayer(num_experts=3, experts=Gated(width=(1, 2))).build(8), "2 widths for 3 experts"),
        (lambda: MoELayer(losses=(ZLoss(), ZLoss(coefficient=0.1))).build(8), "listed twice"),
        (lambda: MoELayer(unit_axes=2).build(8)(torch.randn(8)), "a unit has 2 axes"),
        (lambda: Config.from_dict({"type": "moe.MoELayer", "merge": {"type": "moe.Sum"}}), "unknown config type"),
    ],
)
def test_clear_errors(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_configs_travel_as_json() -> None:
    config = MoELayer(shared=Gated(width=3), merge=GateMerge(), exchange=Capacity(), losses=(ZLoss(),))
    assert MoELayer.from_dict(config.to_dict()) == config
