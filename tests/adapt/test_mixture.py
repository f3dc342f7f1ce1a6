"""Mixtures of LoRA experts on linear maps (MoLA): the checks of the published system."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import moestro
from adapt.adapt_cases import decoder, perturb, tokens
from adapt.mixture_cases import SEVEN, TWO, linear, llama
from moestro.adapt import LayerAllocation, LoRA, Mixture, ShapedAllocation
from moestro.adapt.attach import attach, factors
from moestro.adapt.config import allocation
from moestro.adapt.count import count
from moestro.adapt.mixture.balance import watch
from moestro.adapt.mixture.experts import LoRAExperts
from moestro.core.account import cost
from moestro.core.errors import UserError
from moestro.core.plan import Dense, demand
from moestro.core.signals import Signals
from moestro.models.config import Decoder
from moestro.moe.dropin import collect
from moestro.nn.config import Attention, FeedForward
from moestro.ops.combine import through
from moestro.routers.config import All, Raw, Router
from moestro.testing.compare import assert_close
from moestro.testing.experts import check_experts, plan_for

# The map itself -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("where", ["decoder", "wide decoder", "llama"])
def test_with_b_zero_it_is_the_base_exactly_whatever_the_router_does(where: str) -> None:
    given = tokens()
    model = llama() if where == "llama" else decoder("dense")
    if where == "wide decoder":
        model, where = decoder("dense", ffn=FeedForward(width=176)), "decoder"
    run = (lambda: model(given)[0]) if where == "decoder" else (lambda: model(given).logits)
    want = run()
    targets = ("attention", "ffn") if where == "decoder" else SEVEN
    attach(model, Mixture(targets=targets, allocation=TWO))
    assert len([m for m in model.modules() if hasattr(m, "port")]) == 14
    assert torch.equal(run(), want)
    for name, p in factors(model).items():
        if "router" in name:
            nn.init.normal_(p, std=3.0)
    assert torch.equal(run(), want)
    perturb(model)
    assert not torch.allclose(run(), want)


def test_a_loop_over_tokens_gives_the_same_and_the_frozen_weight_no_gradient() -> None:
    """float64, token by token, with every gradient."""
    m = linear().double()
    x = torch.randn(3, 5, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, 7, dtype=torch.float64)
    (m(x) * weight).sum().backward()
    leaves = [x, m.experts.a, m.experts.b, m.router.score.weight]
    got = [t.grad.clone() for t in leaves]
    assert m.weight.grad is None
    assert m.bias.grad is None
    copies = [t.detach().clone().requires_grad_() for t in leaves]
    z, a, b, w = copies
    rows = []
    for t in z.reshape(-1, 10):
        p = torch.softmax(w @ t, 0)
        best = sorted(range(4), key=lambda e, p=p: (-float(p[e].detach()), e))[:2]
        y = m.weight.detach() @ t + m.bias.detach()
        rows.append(y + sum(p[e] / sum(p[i] for i in best) * 2.0 * (b[e] @ (a[e] @ t)) for e in best))
    want = torch.stack(rows).view(3, 5, 7)
    assert_close("y", m(x), want, 1e-10)
    (want * weight).sum().backward()
    for name, g, t in zip(("x", "a", "b", "router"), got, copies):
        assert_close(f"gradient of {name}", g, t.grad, 1e-10)


def test_all_experts_and_equal_logits_give_the_mean_and_one_expert_is_lora() -> None:
    m = linear(E=4, k=4)
    nn.init.zeros_(m.router.score.weight)
    x = torch.randn(6, 10)
    delta = 2.0 * torch.einsum("eor,eri->oi", m.experts.b, m.experts.a) / 4
    assert_close("mean", m(x), F.linear(x, m.weight + delta, m.bias), 1e-5)
    one = linear(E=1, k=1)
    whole = one.weight + 2.0 * one.experts.b[0] @ one.experts.a[0]
    assert_close("LoRA", one(x), F.linear(x, whole, one.bias), 1e-5)


@pytest.mark.parametrize("experts", [1, 4])
def test_the_bank_passes_the_suite_and_its_mixture_equals_the_way_through_rows(experts: int) -> None:
    def make() -> LoRAExperts:
        made = LoRAExperts(16, 16, experts, 3)
        nn.init.normal_(made.b)
        return made

    check_experts(make, num_experts=experts)
    bank, x = LoRAExperts(16, 9, experts, 3), torch.randn(24, 16)
    nn.init.normal_(bank.b)
    plans = [plan_for(24, experts, 2), Dense(weight=torch.rand(24, experts))]
    for plan in plans:
        grads = []
        for run in (lambda p: bank.mixture(x, p), lambda p: through(bank, x, p)):
            bank.zero_grad()
            y = run(plan)
            y.square().sum().backward()
            grads.append([y.detach(), bank.a.grad.clone(), bank.b.grad.clone()])
        for one, other in zip(*grads):
            assert_close("mixture", one, other, 1e-5)


def test_dropout_spares_the_router_and_differs_by_seed() -> None:
    m = linear()
    m.experts.dropout = 0.5
    x = torch.randn(9, 10)
    with watch(m) as first:
        y = m(x, Signals(seed=1))
    with watch(m) as second:
        z = m(x, Signals(seed=2))
    plans = [next(iter(r.trail.plans().values())) for r in (first, second)]
    assert torch.equal(plans[0].expert, plans[1].expert)
    assert not torch.allclose(y, z)
    assert torch.equal(y, m(x, Signals(seed=1)))
    assert torch.equal(m.eval()(x, Signals(seed=1)), m(x))


def test_soft_routing_over_adapters() -> None:
    """Every expert on every token, weighed by the softmax (X-LoRA-like)."""
    m = linear(choice=Router(select=All(), weigh=Raw()))
    x = torch.randn(6, 10)
    p = torch.softmax(x @ m.router.score.weight.T, -1)
    each = torch.einsum("eor,eri,ti->teo", m.experts.b, m.experts.a, x)
    assert_close("y", m(x), F.linear(x, m.weight, m.bias) + 2.0 * torch.einsum("te,teo->to", p, each), 1e-5)


def test_flops_and_parameters() -> None:
    m, x = linear(), torch.randn(6, 10, requires_grad=True)
    said = cost(m)
    with FlopCounterMode(display=False) as counter:
        y = m(x)
    assert counter.get_total_flops() == said.flops * 6
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == (said.train_flops - said.flops) * 6
    assert said.params == sum(p.numel() for p in m.parameters())
    assert said.active == said.params - m.experts.per_row()[0] // 2


# Allocation and counts ------------------------------------------------------------------------------------------------


def test_published_shapes_by_name() -> None:
    for name, groups in (
        ("triangle-down", (2, 4, 6, 8)),
        ("triangle-up", (8, 6, 4, 2)),
        ("hourglass", (8, 2, 2, 8)),
        ("rectangle", (5, 5, 5, 5)),
        ("middle", (2, 8, 8, 2)),
        ("triangle", (8, 6, 4, 2)),
        ("inverted", (2, 4, 6, 8)),
    ):
        assert allocation(name, 32, 160).experts == tuple(n for n in groups for _ in range(8))
    assert allocation("rectangle", 32, 256).experts == (8,) * 32
    assert allocation("triangle-down", 8, 40).experts == (2, 2, 4, 4, 6, 6, 8, 8)
    for layers, total in itertools.product((4, 6, 7, 32), (60, 61)):
        if total >= 5 * layers:
            assert sum(allocation("triangle-down", layers, total, top_k=1).experts) == total
    with pytest.raises(UserError, match="unknown allocation"):
        allocation("diamond", 4, 20)
    with pytest.raises(UserError, match="fewer than top_k 2"):
        allocation("triangle-down", 4, 8)
    with pytest.raises(UserError, match="layer 1 has 1 experts, 2 choices"):
        LayerAllocation(experts=(2, 1))
    with pytest.raises(UserError, match="speak of 2, 1 and 3 layers"):
        LayerAllocation(experts=(2, 3), rank=(1, 2, 3))
    with pytest.raises(UserError, match="3 numbers for 2 adapted layers"):
        attach(decoder("dense"), Mixture(allocation=LayerAllocation(experts=(2, 3, 4))))


def test_a_shape_by_name_fits_any_number_of_layers() -> None:
    shaped = ShapedAllocation(shape="inverted", rank=3)
    assert [shaped.of(j, 8) for j in (0, 3, 7)] == [(2, 2, 3), (4, 2, 3), (8, 2, 3)]  # 40 over 2-2-4-4-6-6-8-8
    assert sum(shaped.of(j, 32)[0] for j in range(32)) == 160
    assert [ShapedAllocation(shape="middle", total=20, top_k=1).of(j, 4)[0] for j in range(4)] == [2, 8, 8, 2]
    model = decoder("dense")
    attach(model, Mixture(allocation=ShapedAllocation(shape="triangle", total=12)))
    assert {m.layer: m.experts.num_experts for m in model.modules() if hasattr(m, "port")} == {0: 8, 1: 4}
    with pytest.raises(UserError, match="fewer than top_k 2"):
        attach(decoder("dense"), Mixture(allocation=ShapedAllocation(total=3)))
    assert Mixture.from_dict(Mixture(allocation=shaped).to_dict()).allocation == shaped


def test_trainable_parameters_of_llama_2_7b() -> None:
    """660,224 per expert and layer (624,640 and its router rows, 35,584); 105.6M for 160 experts."""
    sizes = {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
    with torch.device("meta"):
        model = llama(**sizes, num_attention_heads=32, num_key_value_heads=32)
    attached = attach(model, Mixture(targets=SEVEN, allocation=allocation("triangle-down", 32, 160)))
    own = factors(model)
    assert all(p.is_meta for p in own.values())
    first = {n: p.numel() for n, p in own.items() if ".layers.0." in n}
    assert sum(first.values()) == 2 * 660_224
    assert sum(v for n, v in first.items() if "router" in n) == 2 * 35_584
    assert attached.trainable == 160 * 660_224 == 105_635_840


def test_what_adapters_cost_is_counted_from_configs() -> None:
    """By hand, for one map [D, D] of one block: E r 2D numbers and E D of the router; all experts' factors are used."""
    D, E, r = 16, 4, 3
    bare = Decoder(dim=D, num_layers=1, attention=Attention(num_heads=2), ffn=FeedForward(width=24))
    config = Mixture(targets=("attention.q",), allocation=LayerAllocation(experts=(E,), rank=(r,)))
    trainable, whole = count(bare, config, 8)
    assert trainable == E * r * 2 * D + E * D
    assert whole.params == bare.num_params() + trainable
    assert whole.flops - bare.flops_per_token(8) == 2 * trainable
    one, rank_of_all = (count(bare, c, 8)[1] for c in (config, LoRA(targets=("attention.q",), rank=E * r)))
    assert one.train_flops - rank_of_all.train_flops == 3 * 2 * E * D  # the router


# Routing that is seen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["decoder", "llama"])
def test_routing_is_seen_by_collect_and_watch(where: str) -> None:
    model = decoder("dense") if where == "decoder" else llama()
    attach(model, Mixture(targets=("attention", "ffn") if where == "decoder" else SEVEN, allocation=TWO))
    with moestro.collect(model) as seen, watch(model) as routing:
        model(tokens())
    assert len(seen.trail) == len(routing.trail) == 14
    assert set(seen.trail) == set(routing.trail)
    paths = {k.path for k in seen.trail}
    assert ("layers.1.mixer.q.delta" if where == "decoder" else "model.layers.1.self_attn.q_proj.delta") in paths
    assert {tuple(p.expert.shape) for p in routing.trail.plans().values()} == {(18, 2)}
    for key, plan in routing.trail.plans().items():
        assert plan.num_experts == (4 if ".1." in key.path else 2)
        assert torch.equal(demand(plan), seen.trail[key].demand)
    with moestro.collect(model) as seen:
        pass
    assert not seen.trail


@pytest.mark.parametrize("where", ["decoder", "llama"])
def test_padding_is_not_routed_and_gets_no_update(where: str) -> None:
    model = decoder("dense") if where == "decoder" else llama()
    attach(model, Mixture(targets=("attention.q",) if where == "decoder" else ("*.q_proj",), allocation=TWO))
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    with watch(model, valid if where == "llama" else None) as routing:
        if where == "decoder":
            model(tokens(), Signals(valid=valid.reshape(-1)))
        else:
            model(tokens(), attention_mask=valid.long())
    counts = routing.trail.counts()
    assert {int(c.sum()) for c in counts.values()} == {15 * 2}
    assert all(bool((p.expert.view(2, 9, 2)[1, 6:] == -1).all()) for p in routing.trail.plans().values())


def by_hand(model: nn.Module, given: Tensor) -> dict[int, float]:
    """L_j from the router inputs: the logits of a layer's maps one after the other, as the released code has them."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        m.router.register_forward_pre_hook(lambda m, a, path=path: inputs.__setitem__(path, a[0].detach()))
        for path, m in model.named_modules()
        if hasattr(m, "port")
    ]
    model(given)
    for hook in hooks:
        hook.remove()
    out = {}
    for layer in (0, 1):
        probs = [
            torch.softmax(x.double() @ model.get_submodule(path).router.score.weight.double().T, -1)
            for path, x in inputs.items()
            if f".{layer}." in path
        ]
        p = torch.cat(probs)
        E = p.shape[1]
        counts = F.one_hot(p.topk(2, -1).indices, E).sum((0, 1)).double()
        out[layer] = float(E * (counts / counts.sum() * p.detach().mean(0)).sum())
    return out


def test_the_balance_loss_is_pooled_over_a_layers_maps_and_summed_over_layers() -> None:
    model = llama()
    attach(model, Mixture(targets=SEVEN, allocation=TWO, balance=0.001, dropout=0.0))
    for n, p in factors(model).items():
        nn.init.normal_(p, std=2.0 if "router" in n else 0.1)
    with watch(model) as routing:
        out = model(tokens(), labels=tokens())
    want = by_hand(model.eval(), tokens())
    found = routing.losses()
    assert {j: float(v.detach()) for j, v in found.items()} == {j: pytest.approx(v, rel=1e-5) for j, v in want.items()}
    assert float(found[1].detach()) > 1.02
    assert float(routing.loss().detach()) == pytest.approx(0.001 * sum(want.values()), rel=1e-5)
    model.zero_grad()
    routing.loss().backward()
    routers = {n: p for n, p in factors(model).items() if "router" in n and ".1." in n}
    assert all(p.grad is not None for p in routers.values())
    assert any(bool(p.grad.any()) for p in routers.values())
    assert out.loss is not None


def test_loads_are_pooled_over_a_layers_maps() -> None:
    model = decoder("dense")
    attach(model, Mixture(targets=("attention.q", "ffn"), allocation=TWO, balance=0.5))
    with watch(model) as routing:
        model(tokens())
    loads = routing.loads()
    assert {j: (len(n), int(n.sum())) for j, n in loads.items()} == {0: (2, 18 * 2 * 4), 1: (4, 18 * 2 * 4)}
    each = [r.load for k, r in routing.trail.items() if "layers.1." in k.path]
    assert torch.equal(loads[1], sum(each))
    trail = routing.pooled()
    assert {k.path for k in trail} == {*(k.path for k in routing.trail), "adapters.0", "adapters.1"}
    assert float(trail.loss().detach()) == pytest.approx(float(routing.loss().detach()))
    assert set(trail.counts()) == {k.path for k in routing.trail}


def test_uniform_routing_has_a_loss_of_one_per_layer() -> None:
    model = decoder("dense")
    attach(model, Mixture(allocation=LayerAllocation(experts=(2, 4), top_k=(2, 4)), balance=1.0))
    for n, p in factors(model).items():
        if "router" in n:
            nn.init.zeros_(p)
    with watch(model) as routing:
        model(tokens())
    assert float(routing.loss().detach()) == pytest.approx(2.0)


def test_a_coefficient_that_nobody_adds_is_an_error() -> None:
    model = decoder("dense")
    attached = attach(model, Mixture(allocation=TWO, balance=0.001))
    assert "loss load_balancing_loss: coefficient 0.001 in 14 layers" in attached.lines
    with pytest.raises(UserError, match="nobody adds the loss"):
        model(tokens())
    model.eval()(tokens())
    with pytest.raises(UserError, match="no forward pass"), watch(model) as routing:
        routing.loss()
    with pytest.raises(UserError, match="no mixture"):
        watch(nn.Linear(2, 2)).__enter__()
    with pytest.raises(UserError, match="no mixture"):
        collect(nn.Linear(2, 2)).__enter__()


def test_training_moves_adapters_only_and_lowers_the_loss_also_with_recomputation() -> None:
    grads = []
    for checkpoint in (False, True):
        model = decoder("dense", checkpoint=checkpoint)
        attach(model, Mixture(allocation=TWO, balance=0.01, dropout=0.1))
        perturb(model, 0.1)
        with watch(model) as routing:
            nats, number, _, _ = model.loss(tokens(), tokens(), Signals(seed=3))
        (nats / number + routing.loss()).backward()
        assert len(routing.trail) == 14
        grads.append({n: p.grad for n, p in factors(model).items()})
        assert all(p.grad is None for n, p in model.named_parameters() if n not in grads[-1])
    for n, g in grads[0].items():
        assert_close(n, grads[1][n], g, 1e-5)
    model = decoder("dense")
    attach(model, Mixture(allocation=TWO, dropout=0.0))
    optimizer, losses = torch.optim.AdamW(factors(model).values(), lr=0.02), []
    for _ in range(15):
        nats, number, _, _ = model.loss(tokens(), tokens())
        optimizer.zero_grad()
        (nats / number).backward()
        optimizer.step()
        losses.append(float(nats.detach() / number))
    assert losses[-1] < losses[0] - 0.1
