"""The decoder: causality, padding, caches, checkpointing, slices, losses, layouts."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from moestro.core.carry import Carry, Replay
from moestro.core.errors import UserError
from moestro.core.params import describe
from moestro.core.plan import Plan
from moestro.core.signals import Signals
from moestro.core.trail import Key
from moestro.experts import Gated
from moestro.models import Block, Decoder, examples
from moestro.models.decoder import Decoder as DecoderModule
from moestro.moe import MoELayer
from moestro.nn import Attention, FeedForward
from moestro.routers import ExpertChoiceSelect, LossFree, Random, Raw, Router, TopK
from moestro.testing.compare import assert_close

B, S = 2, 11


def tokens(config: Decoder, n: int = S, seed: int = 0) -> Tensor:
    return torch.randint(0, config.vocab_size, (B, n), generator=torch.Generator().manual_seed(seed))


def loud(config: Decoder) -> DecoderModule:
    """A model whose parts all matter: larger initial values than one would train with."""
    return config.replace(init_std=0.3, init_depth_scaled=False).build()


@pytest.mark.parametrize("name", examples())
@pytest.mark.parametrize("training", [True, False])
def test_causality(name: str, training: bool) -> None:
    config = examples()[name]
    model, x = loud(config).train(training), tokens(config)
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % config.vocab_size
    with torch.no_grad():
        a, _, left = model(x)
        b, _, other = model(changed)
    assert_close("logits before the change", b[:, :6], a[:, :6], 1e-6)
    assert not torch.allclose(a[:, 6:], b[:, 6:])
    for key in left:
        one, two = left[key].plan, other[key].plan
        assert type(one) is type(two)
        one, two = (p.expert if isinstance(p, Plan) else p.weight for p in (one, two))
        assert_close(key.path, two.view(B, S, -1)[:, :6], one.view(B, S, -1)[:, :6], 1e-6)


@pytest.mark.parametrize("name", examples())
@pytest.mark.parametrize("chunks", [(5, 1, 1, 1, 1, 1, 1), (1, 4, 6)])
def test_cached_decoding_equals_the_whole(name: str, chunks: tuple[int, ...]) -> None:
    config = examples()[name]
    model, x = loud(config).eval(), tokens(config)
    with torch.no_grad():
        want, untouched, _ = model(x)
        assert not untouched.own, "nothing is kept unless asked for"
        carry, parts = model.new_cache(S), []
        for part in x.split(chunks, dim=1):
            logits, carry, _ = model(part, None, carry)
            parts.append(logits)
    assert_close("logits", torch.cat(parts, 1), want, 1e-5)
    assert set(carry.own) == {f"layers.{i}.mixer" for i in range(config.num_layers)}


@pytest.mark.parametrize("name", examples())
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing(name: str, side: str, training: bool) -> None:
    config = examples()[name]
    model, x = loud(config).train(training), tokens(config, 7)
    pad = torch.full((B, 4), 1)
    wide = torch.cat((pad, x) if side == "left" else (x, pad), 1)
    real = slice(4, None) if side == "left" else slice(0, 7)
    valid = torch.zeros_like(wide, dtype=torch.bool)
    valid[:, real] = True
    unit = torch.arange(B * 7)  # what is drawn for a token does not depend on its place in the batch
    places = torch.full((B, 11), -1).masked_scatter(valid, unit)
    want, _, alone = model(x, Signals(unit_id=unit))
    place = None  # absolute positions count from the start of the row unless told
    if config.positions is not None:
        place = (torch.arange(11) - (4 if side == "left" else 0)).clamp_min(0).repeat(B)
    given = Signals(valid=valid.view(-1), unit_id=places.view(-1), position=place)
    got, _, left = model(wide, given)
    assert_close("logits", got[:, real], want, 1e-5)
    for key in alone:
        assert torch.equal(left[key].demand, alone[key].demand), "padding is not counted"  # type: ignore[arg-type]
        for term, t in alone[key].terms.items():
            assert_close(f"{key} {term}", left[key].terms[term].value(), t.value(), 1e-5)
    total, count, _, _ = model.loss(wide, wide, given)
    bare, number, _, _ = model.loss(x, x, Signals(unit_id=unit))
    assert int(count) == int(number) == B * 7
    assert_close("loss", total, bare, 1e-5)


def test_packed_sequences_do_not_see_each_other() -> None:
    config = examples()["mixed"]
    model, x = loud(config).eval(), tokens(config, 10)
    segment = torch.tensor([[0] * 4 + [1] * 6, [2] * 10])
    position = torch.tensor([[*range(4), *range(6)], [*range(10)]])
    packed, _, _ = model(x, Signals(segment=segment.view(-1), position=position.view(-1)))
    assert_close("first", packed[:1, :4], model(x[:1, :4])[0], 1e-5)
    assert_close("second", packed[:1, 4:], model(x[:1, 4:])[0], 1e-5)
    assert_close("other row", packed[1:], model(x[1:])[0], 1e-5)


@pytest.mark.parametrize("name", examples())
def test_checkpointing_changes_no_gradient(name: str) -> None:
    config = examples()[name]
    x = tokens(config)
    results = []
    for save in (False, True):
        model = loud(config.replace(checkpoint=save)).train()
        total, _, _, trail = model.loss(x, x.roll(-1, 1))
        (total + trail.loss()).backward()
        results.append((total, trail.counts(), dict(model.named_parameters())))
    (a, a_counts, plain), (b, b_counts, saved) = results
    assert torch.equal(a, b)
    assert all(torch.equal(a_counts[k], b_counts[k]) for k in a_counts)
    for key, p in plain.items():
        assert p.grad is not None, key
        assert_close(key, saved[key].grad, p.grad, 1e-6)


def test_checkpointing_is_off_outside_training(monkeypatch: pytest.MonkeyPatch) -> None:
    config = examples()["moe"].replace(checkpoint=True)
    model, x = config.build(), tokens(config)
    calls = []
    from moestro.models import stack

    kept = stack.checkpoint
    monkeypatch.setattr(stack, "checkpoint", lambda *a, **k: (calls.append(1), kept(*a, **k))[1])
    model.train()(x)
    assert len(calls) == 2
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    assert len(calls) == 2


@pytest.mark.parametrize("name", examples())
def test_slices_compose(name: str) -> None:
    config = examples()[name]
    model, x = loud(config).eval(), tokens(config)
    want, _, whole = model(x)
    h, trail, carry = model.embed(x), None, Carry()
    for start, stop in ((0, 1), (1, 1), (1, None)):
        h, carry, left = model.run(h, None, carry, start, stop)
        trail = left if trail is None else trail | left
    assert torch.equal(model.head(h), want)
    assert trail is not None
    assert list(trail) == list(whole)
    with pytest.raises(UserError, match="blocks 2 to 1"):
        model.run(h, start=2, stop=1)


@pytest.mark.parametrize("name", examples())
def test_loss_is_cross_entropy(name: str) -> None:
    config = examples()[name]
    model, x = loud(config), tokens(config)
    targets = x.roll(-1, 1)
    targets[:, -1] = -1
    total, count, _, _ = model.loss(x, targets)
    logits = model(x)[0].double()
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    assert int(count) == B * (S - 1)
    assert_close("nats", total, want, 1e-5)


def test_layout_and_counts() -> None:
    config = examples()["mixed"]
    model = config.build()
    assert config.kinds() == ("dense", "moe", "moe")
    assert [type(layer.ffn).__name__ for layer in model.layers] == ["FeedForward", "MoELayer", "MoELayer"]
    trail = model(tokens(config))[2]
    assert list(trail) == [Key("layers.1.ffn"), Key("layers.2.ffn")]
    assert [t.shape[0] for t in trail.counts().values()] == [3, 6]
    names = [n for n, _ in model.named_parameters()]
    assert names[0] == "embed.weight"
    assert {"layers.0.ffn.gate_up", "layers.1.ffn.experts.gate_up", "norm.weight"} <= set(names)
    assert {"layers.0.mixer.q.weight", "layers.0.mixer_norm.weight", "layers.1.ffn.router.score.weight"} <= set(names)
    assert not any(n.startswith("head") for n in model.state_dict()), "a tied matrix is saved once"
    assert "head.weight" in examples()["moe"].build().state_dict()


def test_ties_survive_copies_and_moves() -> None:
    config = examples()["mixed"]
    with torch.device("meta"):
        model = config.build()
    model = copy.deepcopy(model.to_empty(device="cpu").to(torch.float64))
    model.initialise()
    assert model.head.weight is model.embed.weight
    model.loss(tokens(config), tokens(config))[0].backward()
    assert model.embed.weight.grad is not None
    want = config.build().double()
    assert_close("a model from the meta device", model(tokens(config))[0], want(tokens(config))[0], 1e-7)


def test_every_parameter_is_described() -> None:
    for config in examples().values():
        infos = describe(config.build())
        assert {i.role for i in infos.values()} <= {
            "embedding", "head", "attention", "norm", "router", "expert", "shared_expert", "dense",
        }  # fmt: skip


def test_the_seed_is_the_config() -> None:
    config = examples()["moe"]
    torch.manual_seed(0)
    a = config.build().state_dict()
    torch.manual_seed(1)
    b = config.build().state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    c = config.replace(seed=1).build().state_dict()
    assert not torch.equal(a["embed.weight"], c["embed.weight"])


def test_a_replayed_plan_is_addressed_by_path() -> None:
    config = examples()["moe"]
    model, x = loud(config), tokens(config)
    logits, _, trail = model(x)
    plan = trail["layers.1.ffn"].plan
    assert isinstance(plan, Plan)
    moved = dataclasses.replace(plan, expert=(plan.expert + 1) % 4)
    other, _, left = model(x, None, Carry(own={"layers.1.ffn": Replay(moved)}))
    assert torch.equal(left["layers.1.ffn"].plan.expert, moved.expert)  # type: ignore[union-attr]
    assert not torch.allclose(other, logits)
    same, _, _ = model(x, None, Carry(own={"layers.1.ffn": Replay(plan)}))
    assert_close("replaying its own plan", same, logits, 1e-6)


def router(**steps: object) -> Decoder:
    moe = MoELayer(num_experts=4, router=Router(**steps), experts=Gated(width=8), losses=())  # type: ignore[arg-type]
    return examples()["moe"].replace(moe=moe)


def test_noncausal_routers_are_refused() -> None:
    config = router(select=ExpertChoiceSelect(), weigh=Raw())
    with pytest.raises(UserError, match=r"layers\.0\.ffn\.router\.select: ExpertChoiceSelection is not causal"):
        config.build()
    config.replace(allow_noncausal=True).build()(tokens(config))


def test_what_a_routed_layer_is_told() -> None:
    config = examples()["moe"]
    model, x = loud(config).eval(), tokens(config)
    seen: list[Signals] = []
    model.layers[1].ffn.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        _, carry, _ = model(x[:, :7], None, model.new_cache(S))
        model(x[:, 7:], None, carry)
        model(x, Signals(segment=torch.zeros(B * S, dtype=torch.int64)))
    first, second, given = seen
    for signals, (start, stop) in ((first, (0, 7)), (second, (7, S))):
        assert signals.position is not None
        assert signals.position.tolist() == [*range(start, stop)] * B
        assert signals.segment is not None
        assert signals.segment.tolist() == [0] * (stop - start) + [1] * (stop - start)
        assert signals.unit_id is not None
        assert signals.unit_id.tolist() == [b << 32 | t for b in range(B) for t in range(start, stop)]
        assert signals.token is not None
        assert torch.equal(signals.token, x[:, start:stop].reshape(-1))
        assert signals.attend is not None
        held = torch.ones(B * stop, 3)
        assert_close("rows of the attention map", signals.attend(held), torch.ones(B * (stop - start), 3), 1e-6)
    assert given.segment is not None
    assert not given.segment.any(), "what the caller says is not replaced"


def test_random_routes_do_not_depend_on_chunks() -> None:
    config = router(select=Random(k=2))
    model, x = loud(config).eval(), tokens(config)
    with torch.no_grad():
        want, _, _ = model(x, Signals(seed=3))
        carry, parts = model.new_cache(S), []
        for part in x.split((4, 1, 6), dim=1):
            logits, carry, _ = model(part, Signals(seed=3), carry)
            parts.append(logits)
    assert_close("logits", torch.cat(parts, 1), want, 1e-5)
    assert not torch.allclose(model(x, Signals(seed=4))[0], want)


def test_the_bias_of_loss_free_balancing_is_saved() -> None:
    config = router(select=LossFree(inner=TopK(k=2)), activation="sigmoid")
    model = config.build()
    trail = model(tokens(config))[2]
    for path, counts in trail.counts().items():
        model.get_submodule(path).step(counts)  # type: ignore[operator]
    other = config.build()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.layers[0].ffn.router.select.bias, model.layers[0].ffn.router.select.bias)  # type: ignore[union-attr]
    assert bool(model.layers[0].ffn.router.select.bias.any())  # type: ignore[union-attr]


def test_contradictions_are_named() -> None:
    moe = MoELayer()
    cases = {
        "2 entries for num_layers 4": {"layout": ("dense", "dense")},
        "but moe is None": {"layout": ("moe",) * 4},
        "3 entries for 4 MoE blocks": {"moe": moe, "num_experts": (4, 4, 4)},
        "1 blocks for num_layers 4": {"blocks": (Block(),)},
        "leave those unset": {"blocks": (Block(),), "num_layers": 1, "layout": ("dense",)},
        "Decoder.dim must be at least 1": {"dim": 0},
    }
    for message, fields in cases.items():
        with pytest.raises(UserError, match=message):
            Decoder(**fields)  # type: ignore[arg-type]


def test_inputs_that_do_not_fit() -> None:
    config = examples()["dense"]
    model = config.build()
    with pytest.raises(UserError, match=r"33 tokens do not fit the model's context of 32"):
        model(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(UserError, match=r"tokens \[B, S\], not \[5\]"):
        model(torch.zeros(5, dtype=torch.int64))


def test_configs_travel_as_json() -> None:
    import json

    for config in (*examples().values(), Decoder(blocks=(Block(ffn=FeedForward(width=3)),) * 4)):
        assert Decoder.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_precision_of_parts_under_autocast() -> None:
    config = examples()["moe"].replace(attention=Attention(num_heads=2, qk_norm="head"))
    model, x = config.build(), tokens(config)
    with torch.autocast("cpu", torch.bfloat16):
        total, _, _, trail = model.loss(x, x)
    (total + trail.loss()).backward()
    assert total.dtype == torch.float32
    exact = model.loss(x, x)[0]
    assert_close("loss", total, exact, 1e-2)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_routed_decoder_is_one_graph() -> None:
    config = examples()["moe"].replace(num_layers=2)
    model, x = config.build(), tokens(config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits, _, trail = compiled(x)
    want, _, plain = model(x)
    assert_close("logits", logits, want, 1e-6)
    assert {k: r.plan.expert.tolist() for k, r in trail.items()} == {
        k: r.plan.expert.tolist() for k, r in plain.items()
    }
    given = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(logits.logsumexp(-1).sum() + trail.loss(), given)
    expected = torch.autograd.grad(want.logsumexp(-1).sum() + plain.loss(), given)
    for (name, _), a, b in zip(model.named_parameters(), got, expected, strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-5)
