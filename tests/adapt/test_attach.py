"""Putting adapters into models: what is named is adapted, and whatever is not named so is an error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moestro
from adapt.adapt_cases import decoder, loss, perturb, tokens
from moestro.adapt import LoRA
from moestro.adapt.attach import adapters, attach, attach_at, factors, merge, unload, unmerge
from moestro.adapt.config import Adapter
from moestro.adapt.draws import reseed
from moestro.adapt.lora.bank import LoRABank
from moestro.adapt.lora.linear import LoRALinear
from moestro.core.account import cost
from moestro.core.errors import UserError
from moestro.core.params import describe
from moestro.core.signals import Signals
from moestro.experts.config import Gated
from moestro.models.examples import examples
from moestro.testing.compare import assert_close

ALL = LoRA(targets=("experts", "shared", "attention"), rank=3, alpha=5.0)


@pytest.mark.parametrize("name", ["moe", "mixed", "shared", "windowed", "yarn", "blocks", "dense"])
def test_the_model_is_unchanged_and_only_adapters_train(name: str) -> None:
    model = decoder(name)
    given = tokens()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    want = model(given)[0].detach()
    targets = {"shared": ("experts", "shared", "attention"), "dense": ("ffn", "attention")}
    attached = attach(model, LoRA(targets=targets.get(name, ("experts", "attention")), rank=2))
    assert_close("logits", model(given)[0], want, 1e-6)
    own = factors(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(own)
    assert attached.trainable == sum(p.numel() for p in own.values()) > 0
    assert {n: p.shape for n, p in model.named_parameters() if n not in own} == {n: p.shape for n, p in before.items()}
    perturb(model)
    loss(model, given).backward()
    for n, p in model.named_parameters():
        assert (p.grad is not None) == (n in own), n
        if n in own:
            assert bool(p.grad.any()), f"{n} gets no gradient"
        else:
            assert torch.equal(p, before[n])


def test_targets_by_name() -> None:
    def places(*targets: str, **more: object) -> dict[str, tuple[str, ...]]:
        name = str(more.pop("name", "shared"))
        return attach(decoder(name), LoRA(targets=targets, **more)).places

    banks = {f"layers.{i}.ffn.experts": ("gate", "up", "down") for i in (0, 1)}
    assert places("experts") == banks
    assert places("experts.gate", "experts.up", "experts.down") == banks
    assert places("experts.down", partial=True) == dict.fromkeys(banks, ("down",))
    assert places("shared", layers=(1,)) == {"layers.1.ffn.shared": ("gate", "up", "down")}
    assert set(places("attention.q", "*.o")) == {f"layers.{i}.mixer.{n}" for i in (0, 1) for n in "qo"}
    assert places("ffn", name="dense") == {f"layers.{i}.ffn": ("gate", "up", "down") for i in (0, 1)}
    assert set(places("head", name="dense")) == {"head"}


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        ("dense", LoRA(), r"attached to nothing: the target 'experts' matches no part.*ffn \(gate, up, down\)"),
        ("moe", LoRA(targets=("experts", "shared")), "'shared' matches no part"),
        ("moe", LoRA(targets=("expert",)), r"did you mean 'experts'"),
        ("moe", LoRA(targets=("experts.gat",)), r"did you mean 'experts.gate'"),
        ("moe", LoRA(targets=("*.q_proj",)), "attached to nothing"),
        ("moe", LoRA(layers=(7,)), "in layers 7"),
        ("moe", LoRA(targets=("experts.gate",)), "adapters on gate but not on up, down; name the whole"),
        ("moe", LoRA(targets=("experts.gate", "experts.up")), "on gate, up but not on down"),
        ("shared", LoRA(targets=("experts", "shared.up")), r"layers\.0\.ffn\.shared: adapters on up but not on"),
        ("dense", LoRA(targets=("ffn.down",)), "say partial=True"),
    ],
)
def test_adapters_attached_to_nothing_or_to_a_part_are_errors(name: str, config: Adapter, match: str) -> None:
    model = decoder(name)
    with pytest.raises(UserError, match=match):
        attach(model, config)
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters()), "a refused attach has changed the model"


def test_other_refusals() -> None:
    model = decoder()
    with pytest.raises(UserError, match="no adapters"):
        merge(model)
    attach(model, LoRA())
    with pytest.raises(UserError, match="has adapters already"):
        attach(model, LoRA())
    with pytest.raises(UserError, match="no 'layers.9'"):
        attach_at(decoder(), LoRA(), {"layers.9": ["gate"]})
    widths = decoder(moe=examples()["moe"].moe.replace(experts=Gated(width=(4, 5, 6, 7))))
    with pytest.raises(UserError, match=r"layers\.0\.ffn\.experts: its experts have unequal widths"):
        attach(widths, LoRA())


def test_a_second_attach_goes_beside_the_first() -> None:
    model = decoder()
    attach(model, LoRA())
    attach(model, LoRA(targets=("attention",), rank=2))
    assert {type(m) for m in adapters(model).values()} == {LoRABank, LoRALinear}
    assert all(p.requires_grad for p in factors(model).values())


@pytest.mark.parametrize("name", ["shared", "dense"])
def test_merge_unmerge_and_unload_in_a_model(name: str) -> None:
    model, given = decoder(name).eval(), tokens()
    source = copy.deepcopy(model)
    attach(model, ALL if name == "shared" else LoRA(targets=("ffn", "attention"), rank=2))
    perturb(model)
    want = model(given)[0].detach()
    assert float((want - source(given)[0].detach()).abs().max()) > 1e-2
    merge(model)
    assert_close("merged", model(given)[0], want, 1e-5)
    with pytest.raises(UserError, match="add them twice"):
        model.state_dict()
    unmerge(model)
    assert torch.equal(model(given)[0], want)
    state = model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in source.state_dict().items())
    merge(model)
    unload(model)
    assert not adapters(model)
    assert_close("unloaded", model(given)[0], want, 1e-5)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in source.named_parameters()]
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in source.named_modules()}


def test_cached_decoding_and_one_token_at_a_time() -> None:
    model, given = decoder("shared").eval(), tokens(1, 8)
    attach(model, ALL)
    perturb(model)
    want, _, _ = model(given)
    carry, found = model.new_cache(), []
    for i in range(8):
        y, carry, _ = model(given[:, i : i + 1], None, carry)
        found.append(y)
    assert_close("logits", torch.cat(found, 1), want, 1e-5)


def test_recomputation_draws_and_computes_the_same() -> None:
    grads = []
    for checkpoint in (False, True):
        model = decoder("moe", checkpoint=checkpoint).train()
        attach(model, LoRA(targets=("experts", "attention"), rank=2, dropout=0.4))
        perturb(model)
        nats, number, _, _ = model.loss(tokens(), tokens(), Signals(seed=11))
        (nats / number).backward()
        grads.append({n: p.grad for n, p in factors(model).items()})
    for n, g in grads[0].items():
        assert_close(n, grads[1][n], g, 1e-6)


def test_masks_change_with_the_seed_of_the_step_and_with_reseed() -> None:
    for name, targets in (("moe", ("experts",)), ("dense", ("attention",)), ("dense", ("ffn",))):
        model = decoder(name).train()
        attach(model, LoRA(targets=targets, rank=2, dropout=0.4))
        perturb(model)

        def y(seed: int, model: nn.Module = model) -> torch.Tensor:
            return model(tokens(), Signals(seed=seed))[0].detach()

        first = y(1)
        assert torch.equal(first, y(1))
        assert not torch.allclose(first, y(2))
        reseed(model, 5)
        assert not torch.allclose(first, y(1))
        reseed(model, 0)
        assert torch.equal(first, y(1))


def test_a_drop_in_layer_in_a_model_of_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), moestro.MoE(8, 4, 2, 12), nn.Linear(8, 3))
    x = torch.randn(5, 8)
    want = model(x).detach()
    attached = attach(model, LoRA(targets=("experts", "0"), rank=2))
    assert attached.places == {"0": ("weight",), "1.experts": ("gate", "up", "down")}
    assert_close("y", model(x), want, 1e-6)
    perturb(model)
    model(x).sum().backward()
    assert all(bool(p.grad.any()) for p in factors(model).values())


def test_what_adapters_say_of_themselves() -> None:
    model = decoder("shared")
    infos = describe(model)
    attached = attach(model, ALL)
    after = describe(model)
    assert {n: after[n] for n in infos} == infos
    assert {after[n].role for n in factors(model)} == {"expert", "shared_expert", "attention"}
    bank = after["layers.0.ffn.experts.gate_a"]
    assert (bank.expert_axis, bank.matrix_axes) == (0, (1, 2))
    assert "adapters on 2 x experts gate+up+down" in attached.lines
    assert any(line.startswith(f"{attached.trainable:,} of") for line in attached.lines)
    assert cost(model, 8).params == sum(p.numel() for p in model.parameters())


def test_configs_travel_as_json() -> None:
    config = LoRA(targets=("experts", "attention"), rank=3, shared="a", dropout=0.1, router="bias_only")
    assert Adapter.from_dict(config.to_dict()) == config
