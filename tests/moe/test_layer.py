"""The routed layer against its float64 oracle, and its promises."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moestro.core.carry import Carry, Forecast, Live, Replay
from moestro.core.errors import UserError
from moestro.core.plan import AnyPlan, Dense, ExpertChoice, Plan, demand, load
from moestro.core.signals import Signals
from moestro.dispatch import Capacity
from moestro.experts import MLP, Convolution, Gated, Modules
from moestro.experts.modules import ModuleBank
from moestro.moe import ConcatMerge, GateMerge, MeanMerge, MoELayer, SumMerge
from moestro.routers import config as routers
from moestro.routers.examples import examples as router_examples
from moestro.testing.compare import assert_close
from moestro.testing.oracle import choices
from moestro.testing.routers import signals_for

from . import oracle
from .layer_cases import B, D, E, S, T, balance, build, live, plans, tokens


@pytest.mark.parametrize("shared", ["none", "sum", "gate"])
@pytest.mark.parametrize("name", plans())
def test_output_and_all_gradients_equal_the_oracle(name: str, shared: str) -> None:
    changes: dict[str, Any] = {} if shared == "none" else {"shared": Gated(width=7)}
    layer = build(losses=(), merge=GateMerge() if shared == "gate" else SumMerge(), **changes)
    plan = plans()[name]
    weight, carry = live(plan)
    x = tokens().requires_grad_()
    direction = tokens(3)
    y, _, _ = layer(x, Signals(valid=plan.valid), carry)
    (y * direction).sum().backward()

    p = {n: v.detach().double().requires_grad_() for n, v in layer.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    w64 = weight.detach().double().requires_grad_()
    want = oracle.layer(p, x64.reshape(T, D), plan, w64, plan.valid).reshape(B, S, D)
    (want * direction.double()).sum().backward()
    assert_close("y", y, want)
    assert x64.grad is not None
    assert w64.grad is not None
    assert_close("x.grad", x.grad, x64.grad)
    assert_close("weight.grad", weight.grad, torch.where(plan.weight != 0, w64.grad, 0.0))
    for n, v in layer.named_parameters():
        if n.startswith("router."):
            assert v.grad is None
            continue
        assert_close(f"{n}.grad", v.grad, torch.zeros_like(p[n]) if p[n].grad is None else p[n].grad)


@pytest.mark.parametrize("name", router_examples())
def test_every_router_drives_the_layer(name: str) -> None:
    """y is what the oracle makes of the plan in the trail; counts are the plan's; the router receives a gradient."""
    layer = build(router=router_examples()[name], losses=balance(router_examples()[name]))
    signals = signals_for(B, S)
    x = tokens().requires_grad_()
    y, _, trail = layer(x, signals)
    record = trail[""]
    assert record.plan is not None
    p = {n: v.detach().double() for n, v in layer.named_parameters()}
    plan = record.plan
    want = oracle.layer(p, x.detach().double().reshape(T, D), plan, plan.weight.detach().double())
    assert_close("y", y.reshape(T, D), want)
    assert torch.equal(record.demand, demand(plan))
    assert torch.equal(record.load, load(plan))
    assert int(record.dropped) == int((record.demand - record.load).sum())
    (y.square().sum() + trail.loss()).backward()
    assert all(v.grad is not None for n, v in layer.named_parameters() if n.startswith("experts."))
    trained = [v for n, v in layer.named_parameters() if n.startswith("router.") and v.requires_grad]
    assert not trained or any(v.grad is not None and bool(v.grad.any()) for v in trained)
    assert layer.causal == layer.router.causal


def test_gradient_with_respect_to_the_input_in_float64() -> None:
    layer = build(router=routers.Router(weigh=routers.Raw()), shared=Gated(width=4), merge=GateMerge()).double()
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    values = list(layer.parameters())

    def apply(x: Tensor, *values: Tensor) -> Tensor:
        names = [n for n, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))[0]

    assert torch.autograd.gradcheck(apply, (x, *values), fast_mode=True)


# Padding and emptiness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [50.0, float("nan"), float("inf")])
@pytest.mark.parametrize("router", ["linear", "capacity", "expert-choice", "all", "top-p", "null-and-copy"])
def test_padding_gives_zeros_and_has_no_influence(router: str, content: float) -> None:
    layer = build(
        router=router_examples()[router],
        experts=MLP(width=9, bias=True),
        shared=MLP(width=5, bias=True),
        losses=balance(router_examples()[router]),
    )
    signals = signals_for(B, S, padding=2)
    assert signals.valid is not None
    valid = signals.valid.view(B, S)
    results = []
    for fill in (0.0, content):
        layer.zero_grad()
        x = torch.where(valid[..., None], tokens(), fill).requires_grad_()
        y, _, trail = layer(x, signals)
        assert not y[~valid].any()
        (y.square().sum() + trail.loss()).backward()
        assert x.grad is not None
        assert not x.grad[~valid].any()
        grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        results.append([y.detach(), trail.loss().detach(), trail[""].demand, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("experts", [Gated(width=6), MLP(width=6, bias=True), Modules()])
@pytest.mark.parametrize("exchange", ["local", "capacity"])
def test_no_token_routed_at_all(experts: Any, exchange: str) -> None:
    limited = routers.Router(limit=routers.Capacity(factor=1.0))
    layer = build(experts=experts, **({"exchange": Capacity(), "router": limited} if exchange == "capacity" else {}))
    x = tokens().requires_grad_()
    y, _, trail = layer(x, Signals(valid=torch.zeros(T, dtype=torch.bool)))
    assert not y.any()
    assert int(trail[""].load.sum()) == 0
    (y.sum() + trail.loss()).backward()
    for n, p in layer.named_parameters():
        if n.startswith("experts."):
            assert p.grad is not None, n
            assert not p.grad.any(), n
    assert bool(torch.isfinite(trail.loss()))


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D), (D,), (1, 1, D)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = build(shared=Gated(width=4))
    y, _, trail = layer(torch.randn(shape))
    assert y.shape == shape
    y.sum().backward()
    assert int(trail[""].demand.sum()) == 2 * (y.numel() // D)


# Plans that are given ----------------------------------------------------------------------------------------------


def test_replay_keeps_choices_and_recomputes_weights() -> None:
    layer = build()
    x = tokens()
    _, _, trail = layer(x)
    plan = trail[""].plan
    y, carry, again = layer(x.flip(0), carry=Carry(own={"": Replay(plan)}))
    moved = again[""].plan
    assert torch.equal(moved.expert, plan.expert)
    assert not torch.equal(moved.weight, plan.weight)
    y.sum().backward()
    assert bool(layer.router.score.weight.grad.any())
    assert isinstance(carry.mine, Replay)
    same, _, _ = layer(x, carry=Carry(own={"": Replay(plan)}))
    assert_close("replay of the same input", same, layer(x)[0], tol=0.0)


def test_live_plans_send_the_gradient_to_the_router_that_made_them() -> None:
    first, second = build(), build(losses=())
    x = tokens()
    plan, _ = first.plan(x.reshape(T, D), Signals(), Carry())
    y, carry, trail = second(x, carry=Carry().give(0, Live(plan)))
    assert not carry.ahead
    y.square().sum().backward()
    assert bool(first.router.score.weight.grad.any())
    assert second.router.score.weight.grad is None
    assert torch.equal(trail[""].plan.expert, plan.expert)


def test_plans_made_ahead_count_routed_layers() -> None:
    maker, a, b = build(), build(), build()
    x = tokens()
    plan, _ = maker.plan(x.reshape(T, D).flip(0), Signals(), Carry())
    carry = Carry().give(1, Live(plan))
    _, carry, first = a(x, carry=carry)
    assert not torch.equal(first[""].plan.expert, plan.expert)
    _, carry, second = b(x, carry=carry)
    assert torch.equal(second[""].plan.expert, plan.expert)
    assert not carry.ahead


def test_what_is_addressed_to_the_layer_goes_before_what_was_made_ahead() -> None:
    maker, layer = build(), build()
    x = tokens()
    ahead, _ = maker.plan(x.reshape(T, D).flip(0), Signals(), Carry())
    own, _ = maker.plan(x.reshape(T, D).roll(1, 0), Signals(), Carry())
    _, carry, trail = layer(x, carry=Carry(own={"": Live(own)}).give(0, Live(ahead)))
    assert torch.equal(trail[""].plan.expert, own.expert)
    assert not carry.ahead


def test_a_forecast_reaches_prepare_and_changes_nothing() -> None:
    layer = build()
    prepared: list[Any] = []
    layer.exchange.prepare = prepared.append
    x = tokens()
    want, _, _ = layer(x)
    prepared.clear()
    forecast = Forecast(expert=torch.zeros(T, 1, dtype=torch.int64))
    y, _, trail = layer(x, carry=Carry().give(0, forecast))
    assert torch.equal(y, want)
    assert prepared[0] is forecast
    assert torch.equal(prepared[1].expert, trail[""].plan.expert)


def test_plans_that_do_not_fit_are_refused() -> None:
    layer = build()
    x = tokens()
    plan = plans()["top-k"]
    with pytest.raises(UserError, match="about 18 units, x has 6"):
        layer(x[0], carry=Carry(own={"": Live(plan)}))
    with pytest.raises(UserError, match="about 9 experts, the layer has 8"):
        layer(x, carry=Carry(own={"": Live(dataclasses.replace(plan, num_experts=9))}))


@pytest.mark.parametrize("valid", [torch.ones(B, S, dtype=torch.bool), torch.ones(T), torch.ones(T + 1) > 0])
def test_signals_of_a_wrong_shape_are_refused(valid: Tensor) -> None:
    with pytest.raises(UserError, match=r"valid must be flat, one bool per unit: \[18\]"):
        build()(tokens(), Signals(valid=valid))


def test_the_router_may_read_another_tensor() -> None:
    layer = build(router_dim=5)
    x, seen = tokens(), torch.randn(B, S, 5)
    _, _, trail = layer(x, router_input=seen)
    _, _, other = layer(x.flip(0), router_input=seen)
    assert torch.equal(trail[""].plan.expert, other[""].plan.expert)
    with pytest.raises(RuntimeError):
        layer(x)


# Exchange, merges, virtual ids, units -------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["capacity", "capacity-probability", "gshard", "expert-choice", "all"])
def test_capacity_exchange_equals_the_local_one(router: str) -> None:
    made = router_examples()[router]
    local = build(router=made, losses=balance(made))
    table = build(router=made, losses=balance(made), exchange=Capacity())
    table.load_state_dict(local.state_dict())
    results = []
    for layer in (local, table):
        x = tokens().requires_grad_()
        y, _, trail = layer(x, signals_for(B, S, padding=1))
        (y.square().sum() + trail.loss()).backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for i, (a, b) in enumerate(zip(results[1], results[0], strict=True)):
        assert_close(f"tensor {i}", a, b, tol=2e-6)


def test_capacity_exchange_without_a_limit_says_what_to_do() -> None:
    with pytest.raises(UserError, match="give the router a limit"):
        build(exchange=Capacity())(tokens())


def test_merges() -> None:
    x = tokens()
    routed = build()(x)[0]
    outs = {}
    for merge in (SumMerge(), MeanMerge(), ConcatMerge(), GateMerge()):
        layer = build(shared=Gated(width=7), merge=merge)
        with torch.no_grad():
            layer.load_state_dict(build().state_dict(), strict=False)
            layer.shared.gate_up.fill_(0.1)
            layer.shared.down.fill_(0.2)
            if layer.shared_gate is not None:
                layer.shared_gate.weight.zero_()
        outs[type(merge)] = layer(x)[0]
    alone = outs[SumMerge] - routed
    assert float(alone.detach().abs().sum()) > 0
    assert_close("mean", outs[MeanMerge], (routed + alone) / 2, tol=1e-5)
    assert_close("gate of 0", outs[GateMerge], routed + alone / 2, tol=1e-5)
    assert_close("concat", outs[ConcatMerge], torch.cat([routed, alone], -1), tol=1e-5)


def test_a_copy_needs_an_output_like_its_input() -> None:
    layer = MoELayer(num_experts=2, router=routers.Router(select=routers.TopK(k=3), virtual=("copy",))).build(
        D, experts=ModuleBank(lambda e: nn.Linear(D, 5), num_experts=2)
    )
    with pytest.raises(UserError, match="take 'copy' out"):
        layer(tokens())


def test_units_of_more_axes() -> None:
    torch.manual_seed(0)
    config = MoELayer(num_experts=3, experts=Modules(experts=(Convolution(),)), unit_axes=3, router_dim=5)
    layer = config.build(D)
    x, seen = torch.randn(4, D, 6, 6, requires_grad=True), torch.randn(4, 5)
    y, _, trail = layer(x, router_input=seen)
    plan = trail[""].plan
    for t in range(4):
        want = sum(plan.weight[t, k] * layer.experts.members()[int(plan.expert[t, k])](x[t : t + 1])[0] for k in (0, 1))
        assert_close(f"image {t}", y[t], want)
    with pytest.raises(UserError, match="router_input"):
        layer(x)
    valid = torch.tensor([True, False, True, True])
    y, _, _ = layer(x, Signals(valid=valid), router_input=seen)
    assert not y[1].any()
    assert bool(y[2].any())


def by_sequence(kind: str) -> AnyPlan:
    """Plans about 3 sequences, for the 18 tokens that they own; the last token belongs to none."""
    owner = torch.arange(B).repeat_interleave(S)
    owner[-1] = -1
    weight = torch.tensor([[0.9, 0.1], [0.6, 0.0], [0.3, 0.7]])
    if kind == "table":
        expert = torch.tensor([[0, 3], [2, -1], [3, 1]])
        return Plan(expert=expert, weight=weight, num_experts=E, owner=owner, kind="sequence")
    if kind == "dense":
        return Dense(weight=torch.rand(B, E, generator=torch.Generator().manual_seed(0)), owner=owner, kind="sequence")
    unit = torch.full((1, E, 2), -1)
    unit[0, 1], unit[0, 5], unit[0, 6, 0] = torch.tensor([0, 2]), torch.tensor([1, 0]), 2
    weight = torch.where(unit >= 0, torch.rand(1, E, 2, generator=torch.Generator().manual_seed(0)), 0.0)
    return ExpertChoice(unit=unit, weight=weight, num_units=B, owner=owner, kind="sequence")


@pytest.mark.parametrize("kind", ["table", "dense", "experts choose"])
def test_tokens_follow_the_plan_of_their_owner(kind: str) -> None:
    layer = build(losses=())
    plan = by_sequence(kind)
    weight, carry = live(plan)
    valid = torch.ones(T, dtype=torch.bool)
    valid[2] = False
    x = tokens().requires_grad_()
    y, _, trail = layer(x, Signals(valid=valid), carry)
    y.square().sum().backward()

    owner = plan.owner
    assert owner is not None
    w64 = weight.detach().double().requires_grad_()
    p = {n: v.detach().double() for n, v in layer.named_parameters()}
    flat = x.detach().double().reshape(T, D)
    rows = []
    for t in range(T):
        u, y_t = int(owner[t]), torch.zeros(D, dtype=torch.float64)
        for unit, e, w in choices(plan, w64):
            if unit == u and bool(valid[t]):
                y_t = y_t + w * oracle.swiglu(flat[t], p["experts.gate_up"][e], p["experts.down"][e])
        rows.append(y_t)
    want = torch.stack(rows)
    want.square().sum().backward()
    assert_close("y", y.reshape(T, D), want)
    assert w64.grad is not None
    assert_close("weight.grad", weight.grad, w64.grad)
    assert torch.equal(trail[""].demand, demand(plan))
