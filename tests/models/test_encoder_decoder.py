"""Encoders and encoder-decoders: padding, slices, caches, sharing, counting, errors; what the suite rejects."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flop_cases import counter
from moestro.core.carry import Carry
from moestro.core.errors import UserError
from moestro.core.params import describe
from moestro.core.plan import Plan
from moestro.core.signals import Signals
from moestro.core.trail import Key
from moestro.models import Block, Decoder, Encoder, EncoderDecoder, encoder_decoders, encoders, examples
from moestro.nn import Attention, CrossAttention, PlainFeedForward, RelativeBias
from moestro.testing.compare import assert_close
from moestro.testing.models import check_model

B, N, S = 2, 9, 7


def tokens(vocab: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (B, n), generator=torch.Generator().manual_seed(seed))


def loud(config: Any) -> Any:
    """A model whose parts all matter: larger initial values than one would train with."""
    wide = {"init_std": 0.3, "init_depth_scaled": False}
    if isinstance(config, EncoderDecoder):
        config = config.replace(encoder=config.encoder.replace(**wide), decoder=config.decoder.replace(**wide))
    else:
        config = config.replace(**wide)
    return config.build()


def pair(config: EncoderDecoder) -> tuple[Tensor, Tensor]:
    return tokens(config.encoder.vocab_size, N, 1), tokens(config.decoder.vocab_size, S, 2)


# Encoders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", encoders())
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing(name: str, side: str, training: bool) -> None:
    config = encoders()[name]
    model, x = loud(config).train(training), tokens(37, 6)
    pad = torch.full((B, 3), 1)
    wide = torch.cat((pad, x) if side == "left" else (x, pad), 1)
    real = slice(3, None) if side == "left" else slice(0, 6)
    valid = torch.zeros_like(wide, dtype=torch.bool)
    valid[:, real] = True
    place = (torch.arange(9) - (3 if side == "left" else 0)).clamp_min(0).repeat(B)
    absolute = config.positions is not None  # these count from the start of the row unless told
    want, _, alone = model(x)
    got, _, left = model(wide, Signals(valid=valid.view(-1), position=place if absolute else None))
    assert_close("hidden states", got[:, real], want, 1e-5)
    for key in alone:
        assert torch.equal(left[key].demand, alone[key].demand), "padding is not counted"  # type: ignore[arg-type]


@pytest.mark.parametrize("name", encoders())
def test_slices_compose(name: str) -> None:
    config = encoders()[name]
    model, x = loud(config).eval(), tokens(37, N)
    want, _, whole = model(x)
    h, trail, carry = model.embed(x), None, Carry()
    for start, stop in ((0, 0), (0, 1), (1, 1), (1, None)):
        h, carry, left = model.run(h, None, carry, start, stop)
        trail = left if trail is None else trail | left
    assert torch.equal(h, want)
    assert trail is not None
    assert list(trail) == list(whole)


@pytest.mark.parametrize("name", ["dense", "t5"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    config, x = encoders()[name], tokens(37, N)
    results = []
    for save in (False, True):
        model = loud(config.replace(checkpoint=save)).train()
        h, _, trail = model(x)
        (h.square().sum() + trail.loss()).backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    for key, grad in results[0].items():
        if not key.startswith("embed"):
            assert grad is not None, key
        assert_close(key, results[1][key], grad, 1e-6)


def test_encoders_do_not_look_back_only() -> None:
    with pytest.raises(UserError, match="block 0 looks back only"):
        Encoder(attention=Attention())
    with pytest.raises(UserError, match="block 1 looks back only"):
        Encoder(num_layers=2, blocks=(Block(mixer=Attention(causal=False)), Block()))
    with pytest.raises(UserError, match="Attention is not causal"):
        Decoder(attention=Attention(causal=False)).build()
    blocks = tuple(Block(mixer=Attention(num_heads=n, positions=None)) for n in (2, 4))
    with pytest.raises(UserError, match="equally many heads"):
        Decoder(num_layers=2, blocks=blocks, relative_bias=RelativeBias())


def test_a_shared_bias_is_one_per_layer_with_equal_tables() -> None:
    """Bias from one table = every layer with a table of its own that holds the same numbers."""
    config = encoders()["t5"].replace(moe=None, layout=None)
    shared = loud(config)
    assert isinstance(config.attention, Attention)
    own = config.replace(relative_bias=None, attention=config.attention.replace(positions=config.relative_bias))
    apart = own.build()
    state = shared.state_dict()
    table = state.pop("relative.table")
    for i in range(config.num_layers):
        state[f"layers.{i}.mixer.relative.table"] = table
    apart.load_state_dict(state)
    x = tokens(37, N)
    assert_close("hidden states", apart(x)[0], shared(x)[0], 1e-6)


# Encoder-decoders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", encoder_decoders())
@pytest.mark.parametrize("chunks", [(4, 1, 1, 1), (1, 2, 4)])
def test_cached_decoding_equals_the_whole(name: str, chunks: tuple[int, ...]) -> None:
    config = encoder_decoders()[name]
    model = loud(config).eval()
    source, target = pair(config)
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[0, 6:] = False
    signals = Signals(valid=valid.view(-1))
    with torch.no_grad():
        want, untouched, trail = model(source, target, None, None, signals)
        assert not untouched.own, "nothing is kept unless asked for"
        memory, _, left = model.encode(source, signals)
        carry, parts = model.new_cache(S), []
        for i, part in enumerate(target.split(chunks, dim=1)):
            logits, carry, _ = model.decode(part, memory if i == 0 else None, None, carry)
            parts.append(logits)
    assert_close("logits", torch.cat(parts, 1), want, 1e-5)
    layers = config.decoder.num_layers
    assert set(carry.own) == {f"decoder.layers.{i}.{part}" for i in range(layers) for part in ("mixer", "cross")}
    assert {k.path for k in left} == {k.path for k in trail if k.path.startswith("encoder.")}


def test_trails_lie_under_the_two_sides() -> None:
    model = encoder_decoders()["t5"].build()
    source, target = pair(model.config)
    _, _, trail = model(source, target)
    assert list(trail) == [Key("encoder.layers.1.ffn"), Key("decoder.layers.0.ffn")]
    first, second = (r.plan for r in trail.values())
    assert isinstance(first, Plan)
    assert isinstance(second, Plan)
    assert (len(first.expert), len(second.expert)) == (B * N, B * S)
    for path in trail.counts():
        model.get_submodule(path).step(trail.counts()[path])  # a trail's paths are those of modules


@pytest.mark.parametrize("name", ["t5", "rotary"])
def test_checkpointing_changes_no_gradient_of_a_pair(name: str) -> None:
    config = encoder_decoders()[name]
    source, target = pair(config)
    results = []
    for save in (False, True):
        sides = {s: getattr(config, s).replace(checkpoint=save) for s in ("encoder", "decoder")}
        model = loud(config.replace(**sides)).train()
        total, _, _, trail = model.loss(source, target, target.roll(-1, 1))
        (total + trail.loss()).backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    for key, grad in results[0].items():
        assert grad is not None, key
        assert_close(key, results[1][key], grad, 1e-6)


def test_what_streams_in_the_encoder_ends_there() -> None:
    model = encoder_decoders()["dense"].build()
    source, target = pair(model.config)
    seen = {}

    def hook(name: str):
        def keep(module: nn.Module, args: tuple, output: tuple) -> tuple:
            seen[name] = args[2].state
            return (output[0], args[2].with_state("state", name), *output[2:])

        return keep

    model.encoder.layers[1].register_forward_hook(hook("encoder"))
    model.decoder.layers[0].register_forward_hook(hook("decoder"))
    _, carry, _ = model(source, target)
    assert seen == {"encoder": {}, "decoder": {}}
    assert carry.state == {"state": "decoder"}


@pytest.mark.parametrize("name", encoder_decoders())
def test_loss_is_that_of_the_logits(name: str) -> None:
    config = encoder_decoders()[name]
    model = loud(config)
    source, target = pair(config)
    targets = tokens(config.decoder.vocab_size, S, 3)
    targets[0, 5:] = -1
    logits, _, trail = model(source, target)
    total, count, _, left = model.loss(source, target, targets)
    want = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    assert int(count) == B * S - 2
    assert_close("nats", total, want, 1e-5)
    assert list(left) == list(trail)


def test_shared_embeddings_are_one_parameter() -> None:
    config = encoder_decoders()["t5"]
    model = config.build()
    names = [n for n, p in model.named_parameters() if p.shape == (37, 16)]
    assert names == ["decoder.embed.weight"]
    assert names == [n for n, t in model.state_dict().items() if t.shape == (37, 16)]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.decoder.embed.weight.add_(1.0)
    assert torch.equal(twin.encoder.embed.weight, twin.decoder.embed.weight)
    assert not torch.equal(model.encoder.embed.weight, twin.encoder.embed.weight)
    apart = config.replace(shared=False)
    assert apart.num_params() - config.num_params() == 37 * 16
    assert describe(apart.build())["encoder.embed.weight"].role == "embedding"


def test_sides_start_from_different_values() -> None:
    config = encoder_decoders()["dense"]
    model, again, other = config.build(), config.build(), config.replace(seed=1).build()
    here, there = model.encoder.layers[0].mixer.q.weight, model.decoder.layers[0].mixer.q.weight
    assert here.shape == there.shape
    assert not torch.equal(here, there)
    for (n, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(a, b), n
        if a.ndim == 2:
            assert not torch.equal(a, c), n
    other.initialise(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("name", encoder_decoders())
@pytest.mark.parametrize(("n", "s"), [(9, 7), (5, 5), (3, 8)])
def test_flops(name: str, n: int, s: int) -> None:
    config = encoder_decoders()[name]
    sides = {"encoder": config.encoder.replace(checkpoint=False), "decoder": config.decoder.replace(checkpoint=False)}
    config = config.replace(**sides)
    model = config.build()
    source, target = tokens(config.encoder.vocab_size, n), tokens(config.decoder.vocab_size, s)
    with counter() as count:
        model(source, target)
    assert B * model.flops(n, s) == count.get_total_flops()
    with counter() as count:
        model(source, target)[0].sum().backward()
    assert B * model.flops(n, s, train=True) == count.get_total_flops()
    if n == s:
        assert config.flops_per_token(n) * n == model.flops(n, n)
        assert config.flops_per_token(n, "train") * n == model.flops(n, n, train=True)
    assert config.num_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", encoders())
def test_flops_of_encoders(name: str) -> None:
    config = encoders()[name].replace(checkpoint=False)
    model = config.build()
    with counter() as count:
        model(tokens(37, N))
    assert config.flops_per_token(N) * B * N == count.get_total_flops()
    with counter() as count:
        model(tokens(37, N))[0].sum().backward()
    assert config.flops_per_token(N, "train") * B * N == count.get_total_flops()


def test_parameters_of_t5_base() -> None:
    """222 903 552, the number of the released T5-Base (Raffel et al. 2020 say 220 million)."""
    attention = Attention(num_heads=12, head_dim=64, scale=1.0, positions=None)
    sizes = {"vocab_size": 32_128, "dim": 768, "num_layers": 12, "ffn": PlainFeedForward(width=3072)}
    config = EncoderDecoder(
        encoder=Encoder(attention=attention.replace(causal=False), relative_bias=RelativeBias(), **sizes),
        decoder=Decoder(
            attention=attention, relative_bias=RelativeBias(), cross=CrossAttention(num_heads=12), tied=True, **sizes
        ),
    )
    assert config.num_params() == config.num_active_params() == 222_903_552


def test_contradictions_are_refused() -> None:
    good = encoder_decoders()["t5"]
    with pytest.raises(UserError, match="no block looks at the encoder"):
        EncoderDecoder(decoder=Decoder())
    with pytest.raises(UserError, match="the encoder is 8 wide, cross-attention expects 16"):
        good.replace(encoder=good.encoder.replace(dim=8), shared=False)
    with pytest.raises(UserError, match="the same vocab_size and dim"):
        good.replace(encoder=good.encoder.replace(vocab_size=5))
    with pytest.raises(UserError, match=r"EncoderDecoder\.start: 37"):
        good.replace(start=37)
    with pytest.raises(UserError, match="leave cross unset"):
        Decoder(num_layers=1, blocks=(Block(),), cross=CrossAttention())
    some = good.decoder.replace(cross=None, layout=None, blocks=(good.decoder.resolved()[0], Block()))
    mixed = good.replace(decoder=some.replace(relative_bias=None)).build()
    assert list(mixed(tokens(37, N), tokens(37, S))[0].shape) == [B, S, 37]
    alone = good.decoder.build()
    with pytest.raises(UserError, match="neither a memory nor a filled cache"):
        alone(tokens(37, S))
    with pytest.raises(UserError, match="a memory is of no use"):
        examples()["moe"].build()(tokens(37, S), None, None, good.build().encode(tokens(37, N))[0])


# What the suite rejects ---------------------------------------------------------------------------------------------


def test_the_suite_finds_an_encoder_that_looks_back_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from moestro.nn import attention

    monkeypatch.setattr(attention, "kernel_mask", lambda s, n, *_: (torch.ones(s, n).tril().bool(), False))
    with pytest.raises(AssertionError, match="both directions"):
        check_model(encoders()["dense"], steps=1)


def test_the_suite_finds_padding_of_the_source_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from moestro.models import encoder_decoder

    kept = encoder_decoder.Memory
    monkeypatch.setattr(encoder_decoder, "Memory", lambda states, valid: kept(states, None))
    with pytest.raises(AssertionError, match="padding of the source"):
        check_model(encoder_decoders()["dense"], steps=1)


def test_the_suite_finds_a_source_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    from moestro.models import encoder_decoder

    kept = encoder_decoder.Memory
    monkeypatch.setattr(encoder_decoder, "Memory", lambda states, valid: kept(states * 0, valid))
    with pytest.raises(AssertionError, match="does not depend on it"):
        check_model(encoder_decoders()["t5"], steps=1)


def test_a_pair_is_one_graph() -> None:
    config, small = encoder_decoders()["t5"], {"checkpoint": False, "num_layers": 1, "layout": ("moe",)}
    sides = {"encoder": config.encoder.replace(**small), "decoder": config.decoder.replace(**small)}
    model = config.replace(**sides).build()
    source, target = pair(config)
    logits, _, trail = torch.compile(model, backend="aot_eager", fullgraph=True)(source, target)
    want, _, plain = model(source, target)
    assert_close("logits", logits, want, 1e-6)
    given = list(model.parameters())
    got = torch.autograd.grad(logits.logsumexp(-1).sum() + trail.loss(), given)
    expected = torch.autograd.grad(want.logsumexp(-1).sum() + plain.loss(), given)
    for (name, _), a, b in zip(model.named_parameters(), got, expected, strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-5)
