"""The dense twin: equal FLOPs layer by layer, equal shared values."""

from __future__ import annotations

import pytest
import torch

from moestro.core.account import cost
from moestro.core.errors import UserError
from moestro.experts import MLP, Gated
from moestro.models import Decoder, encoder_decoders, examples
from moestro.models.twin import dense_twin, twin_width
from moestro.moe import MoELayer
from moestro.nn import Attention, FeedForward
from moestro.routers import Cosine, Router, TopK

BASE = Decoder(
    dim=64,
    num_layers=3,
    attention=Attention(num_heads=4),
    moe=MoELayer(num_experts=8, router=Router(select=TopK(k=2)), experts=Gated(width=48)),
)
CONFIGS = {
    **{name: c for name, c in examples().items() if "moe" in c.kinds()},
    "base": BASE,
    "layout": BASE.replace(layout=("dense", "moe", "moe"), num_experts=(4, 16), ffn=FeedForward(width=100)),
    "plain": BASE.replace(moe=MoELayer(router=Router(score=Cosine(rank=8)), experts=MLP(width=50, activation="gelu"))),
    "shared": BASE.replace(moe=MoELayer(experts=Gated(width=31), shared=Gated(width=17))),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_agree_layer_by_layer(name: str) -> None:
    config = CONFIGS[name]
    twin = dense_twin(config, seq_len=16)
    with torch.device("meta"):
        sparse, dense = config.build(), twin.build()
    for a, b in zip(sparse.layers, dense.layers, strict=True):
        step = 3 * b.ffn.gate_up.shape[1]  # half a unit of width, where 1 percent is less
        want = cost(a.ffn, 16).flops
        assert abs(cost(b.ffn, 16).flops - want) <= max(0.01 * want, step)
    assert twin.flops_per_token(16) == pytest.approx(config.flops_per_token(16), rel=0.01)
    assert set(twin.kinds()) == {"dense"}


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_parameters_start_equal(name: str) -> None:
    config = CONFIGS[name]
    sparse = dict(config.build().named_parameters())
    dense = dict(dense_twin(config).build().named_parameters())
    routed = {f"layers.{i}.ffn." for i, kind in enumerate(config.kinds()) if kind == "moe"}
    for name_, value in sparse.items():
        if not any(name_.startswith(r) for r in routed):
            assert torch.equal(value, dense.pop(name_)), name_
    assert all(any(n.startswith(r) for r in routed) for n in dense), "nothing else in the twin"


def test_width_by_hand() -> None:
    layer = MoELayer(num_experts=8, router=Router(select=TopK(k=2)), experts=Gated(width=96))
    assert twin_width(layer, dim=128) == 196, "2 * 96 + 8 / 3 = 194.67: 192 is 1.4 percent off, 196 is 0.7"
    wider = layer.replace(experts=Gated(width=160))
    assert twin_width(wider, dim=128) == 320, "322.67: the multiple of 8 is 0.8 percent off"
    narrow = layer.replace(experts=Gated(width=30))
    assert twin_width(narrow, dim=128) == 63, "62.67: 64 is 2.1 percent off, 62 is 1.1"


def test_a_plain_config_where_layers_are_alike() -> None:
    twin = dense_twin(BASE)
    assert twin.blocks is None
    assert twin.moe is None
    assert twin.ffn.width == 98, "2 * 48 + 8 / 3"


def test_nothing_to_replace() -> None:
    with pytest.raises(UserError, match="no routed layer"):
        dense_twin(BASE.replace(moe=None))
    tiny = MoELayer(num_experts=4, router=Router(select=TopK(k=2)), experts=Gated(width=1))
    with pytest.raises(UserError, match="over 1 percent apart; use wider experts"):
        dense_twin(BASE.replace(moe=tiny, vocab_size=2, context=2, attention=Attention(num_heads=1, head_dim=2)))


@pytest.mark.parametrize("name", ["t5", "rotary"])
def test_twin_of_a_pair(name: str) -> None:
    pair = encoder_decoders()[name]
    wide = pair.encoder.moe.replace(experts=pair.encoder.moe.experts.replace(width=48))
    sides = {side: getattr(pair, side).replace(moe=wide, residual_scale=0.5) for side in ("encoder", "decoder")}
    config = pair.replace(**sides)
    twin = dense_twin(config, 16)
    assert twin.flops_per_token(16) == pytest.approx(config.flops_per_token(16), rel=0.01)
    assert {*twin.encoder.kinds(), *twin.decoder.kinds()} == {"dense"}
    sparse, dense = (dict(c.build().named_parameters()) for c in (config, twin))
    shared = [n for n in sparse if ".ffn." not in n]
    assert shared == [n for n in dense if ".ffn." not in n]
    assert all(torch.equal(sparse[n], dense[n]) for n in shared)
    assert [b.residual_scale for b in twin.decoder.resolved()] == [0.5, 0.5]
    with pytest.raises(UserError, match="its own twin"):
        dense_twin(twin, 16)
