"""Post-norm blocks, norms of embeddings, and attention maps that lose entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flop_cases import counter
from moestro.core.carry import Carry
from moestro.core.draws import fold, uniform
from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.models import Block, Encoder, PostNormBlock, encoder_decoders, encoders, examples
from moestro.nn import Attention, CrossAttention, LayerNorm, Learned
from moestro.nn.cross import Memory
from moestro.nn.dropped import attend
from moestro.testing.compare import assert_close
from moestro.testing.models import check_model

B, S = 2, 7
PLAIN = Attention(num_heads=2, head_dim=4, positions=None)


def tokens() -> Tensor:
    return torch.randint(0, 37, (B, S), generator=torch.Generator().manual_seed(0))


def test_a_post_norm_block_by_hand() -> None:
    """THOR, brief 02: LN(x + f(x)), for both parts."""
    block = PostNormBlock(mixer=PLAIN, ffn=examples()["dense"].ffn).build(8).eval()
    h, signals = torch.randn(B, S, 8), Signals()
    y, _, _ = block(h, signals, Carry())
    half = torch.nn.functional.layer_norm(h + block.mixer(h, signals, None)[0], (8,))
    want = torch.nn.functional.layer_norm(half + block.ffn(half)[0], (8,))
    assert_close("y", y, want, 1e-6)


def test_a_post_norm_cross_block_by_hand() -> None:
    model = encoder_decoders()["post_norm"].build().eval()
    block, h = model.decoder.layers[1], torch.randn(B, S, 16)
    memory = Memory(torch.randn(B, 5, 16))
    y, _, _ = block(h, Signals(), Carry(), None, memory)
    one = block.mixer_norm(h + block.mixer(h, Signals(), None)[0])
    two = block.cross_norm(one + block.cross(one, memory)[0])
    assert_close("y", y, block.ffn_norm(two + block.ffn(two)[0]), 1e-6)


def test_the_last_block_s_norm_is_the_last() -> None:
    config = examples()["post_norm"]
    model = config.build()
    assert not [name for name, _ in model.named_parameters() if name.startswith("norm.")]
    listed = config.replace(blocks=(Block(mixer=PLAIN), PostNormBlock(mixer=PLAIN)), layout=None, moe=None)
    assert listed.ends_normed()
    assert not listed.replace(blocks=listed.blocks[::-1]).ends_normed()
    h = torch.randn(B, S, 16)
    assert_close("run", model.eval().run(h, start=2)[0], h, 0.0)


def test_embeddings_positions_norm_then_dropout() -> None:
    """BERT's order: the norm of word and position embeddings, then dropout."""
    config = Encoder(
        vocab_size=37,
        dim=8,
        num_layers=1,
        blocks=(Block(mixer=PLAIN.replace(causal=False)),),
        positions=Learned(),
        embedding_norm=LayerNorm(),
        dropout=0.5,
    )
    model = config.build().train()
    seen: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    signals = Signals(seed=5, unit_id=torch.arange(B * S))
    model(tokens(), signals)
    h = model.embed_norm(model.embed(tokens()) + model.positions.table[:S])
    kept = uniform(fold(5, "dropout.embed"), torch.arange(B * S), 8) >= 0.5
    assert_close("h", seen[0], h * 2 * kept.view(B, S, 8), 1e-6)


# Attention dropout --------------------------------------------------------------------------------------------------


def given(keys: int = S, heads: int = 2, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    q = torch.randn(B, heads, S, 4, generator=gen)
    k, v = (torch.randn(B, groups, keys, 4, generator=gen) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mask", ["none", "causal", "added"])
def test_without_a_share_it_is_attention(groups: int, mask: str) -> None:
    q, k, v = given(heads=4, groups=groups)
    said = {
        "none": None,
        "causal": torch.ones(S, S, dtype=torch.bool).tril(),
        "added": torch.randn(1, 4, S, S, generator=torch.Generator().manual_seed(2)),
    }[mask]
    got = attend(q, k, v, 0.0, 3, torch.arange(B * S), said, 0.7)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=said, scale=0.7, enable_gqa=True)
    assert_close("y", got, want, 1e-6)


def test_entries_of_the_map_are_dropped_by_query_head_and_key() -> None:
    q, k, v = given()
    unit = torch.arange(B * S) + 50
    got = attend(q, k, v, 0.4, 3, unit)
    for b in range(B):
        for s in range(S):
            kept = uniform(3, unit[b * S + s][None], S * 2).view(S, 2) >= 0.4
            for h in range(2):
                seen = torch.softmax(q[b, h, s] @ k[b, h].T / 2, -1) * kept[:, h] / 0.6
                assert_close("row", got[b, h, s], seen @ v[b, h], 1e-5)
    longer = attend(q, torch.cat((k, k), 2), torch.cat((v, v * 0), 2), 0.4, 3, unit)
    assert_close("draws of a key do not depend on how many there are: half of the weight", longer, got / 2, 1e-5)


@pytest.mark.parametrize("config", [examples()["post_norm"], encoders()["post_norm"]], ids=["decoder", "encoder"])
def test_seeds_and_evaluation(config: Any) -> None:
    config = config.replace(dropout=0.0, attention=config.attention.replace(dropout=0.4))
    model, x = config.build(), tokens()
    still = config.replace(attention=config.attention.replace(dropout=0.0)).build()
    with torch.no_grad():
        assert torch.equal(model.eval()(x)[0], still.eval()(x)[0])
        one, again, other = (model.train()(x, Signals(seed=s))[0] for s in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.allclose(one, other)
        units = ((torch.arange(B) << 32)[:, None] + torch.arange(S)).reshape(-1)
        assert torch.equal(model(x, Signals(seed=1, unit_id=units))[0], one), "rows number their units"
        alone = model(x[1:], Signals(seed=1, unit_id=units[S:]))[0]
        assert_close("a row alone draws as in its batch", alone, one[1:], 1e-5)


def test_cross_attention_drops_in_training() -> None:
    cross, x, memory = CrossAttention(num_heads=2, dropout=0.3).build(8), torch.randn(B, S, 8), torch.randn(B, 5, 8)
    seen = Memory(memory, torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    one, two = (cross.train()(x, seen, None, Signals(seed=s))[0] for s in (1, 2))
    assert not torch.allclose(one, two)
    loud = Memory(torch.where(seen.valid[..., None], memory, 9.0), seen.valid)
    assert_close("padding", cross(x, loud, None, Signals(seed=1))[0], one, 1e-6)
    still = CrossAttention(num_heads=2).build(8)
    still.load_state_dict(cross.state_dict())
    assert_close("evaluation", cross.eval()(x, seen)[0], still(x, seen)[0], 1e-6)


def test_recomputation_draws_the_same() -> None:
    results = []
    for save in (False, True):
        config = examples()["post_norm"].replace(checkpoint=save)
        model = config.replace(attention=config.attention.replace(dropout=0.3)).build().train()
        total, _, _, trail = model.loss(tokens(), tokens().roll(-1, 1), Signals(seed=4))
        (total + trail.loss()).backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in results[0].items():
        assert_close(name, results[1][name], grad, 1e-6)


def test_the_suite_with_dropout() -> None:
    pair = encoder_decoders()["post_norm"]
    sides: dict[str, Any] = {
        name: side.replace(dropout=0.05, attention=side.attention.replace(dropout=0.1))
        for name, side in (("encoder", pair.encoder), ("decoder", pair.decoder))
    }
    sides["decoder"] = sides["decoder"].replace(cross=pair.decoder.cross.replace(dropout=0.1))
    check_model(pair.replace(**sides))
    check_model(sides["encoder"])


def test_flops_of_training() -> None:
    base = examples()["post_norm"].replace(layout=None, moe=None)
    config = base.replace(attention=base.attention.replace(dropout=0.1))
    model = config.build().train()
    with counter() as count:
        model.loss(tokens(), tokens())[0].backward()
    assert count.get_total_flops() == B * S * config.flops_per_token(S, "train")


def test_impossible() -> None:
    for kind in (Attention, CrossAttention):
        with pytest.raises(UserError, match=rf"{kind.__name__}\.dropout"):
            kind(dropout=1.0)
    with pytest.raises(UserError, match="joined with dropout"):
        Attention(sinks=True, dropout=0.1)
