"""Experts on, on top of and inside an encoder (13): capacity, weights, starts, and what can be frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.models.config import Encoder, Headed
from moestro.models.expert_places import blocks_on_top, experts_inside, experts_on_top, gshard_layer, switch_layer
from moestro.models.growth import still, thaw
from moestro.moe.config import MoELayer
from moestro.nn.config import Attention, PlainFeedForward
from moestro.nn.init import initialise
from moestro.testing.headed import check_headed

ENCODER = Encoder(
    vocab_size=31,
    dim=8,
    num_layers=2,
    attention=Attention(num_heads=2, causal=False),
    ffn=PlainFeedForward(width=12),
    norm_order="post",
    context=16,
)
TOKENS = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))


def plan_of(config: MoELayer, x: torch.Tensor, train: bool, seed: int = 0):
    layer = config.build(x.shape[-1])
    initialise(layer, 0, None)
    rows = torch.arange(x.shape[0])[:, None].expand(x.shape[:2]).reshape(-1)
    y, _, trail = layer.train(train)(x, Signals(seed=seed, segment=rows))
    return trail[("", 0)].plan, y


@pytest.mark.parametrize(("train", "room"), [(True, 30), (False, 48)])
def test_capacity_of_the_brief(train: bool, room: int) -> None:
    """E 16, n 384: at most int(384 * 1.25 / 16) = 30 tokens of a sequence, 48 in evaluation; first choices first."""
    x = torch.randn(2, 384, 16, generator=torch.Generator().manual_seed(1))
    x[..., :8] += 2.0  # some experts are asked for more than they have room for
    plan, _ = plan_of(gshard_layer(16, 4), x, train)
    assert plan.kept is not None
    for first in (0, 384):
        expert, kept = plan.expert[first : first + 384], plan.kept[first : first + 384]
        load = expert[kept].bincount(minlength=16)
        assert int(load.max()) == room
        for e in range(16):
            wanted = (expert[:, 0] == e).nonzero()[:, 0]
            served = kept[:, 0].nonzero()[:, 0]
            assert sorted(set(wanted.tolist()) & set(served.tolist())) == wanted[:room].tolist()
            if len(wanted) >= room:
                assert not (kept[:, 1] & (expert[:, 1] == e)).any()


def test_combine_weights_of_the_brief() -> None:
    """They sum to at most 1, and to 1 where nothing was dropped and the second choice was kept."""
    x = torch.randn(2, 384, 16, generator=torch.Generator().manual_seed(1))
    plan, y = plan_of(gshard_layer(16, 4), x, True)
    total, kept = plan.weight.sum(1), plan.kept
    assert bool((total <= 1 + 1e-6).all())
    torch.testing.assert_close(total[kept.all(1)], torch.ones(int(kept.all(1).sum())))
    assert bool((~kept).any())
    neither = ~kept.any(1)
    assert bool(neither.any())
    assert not y.reshape(-1, 16)[neither].any()  # no residual: the zero vector


def test_the_released_gate_is_near_one_hot_and_draws_in_evaluation() -> None:
    x = torch.randn(2, 64, 768, generator=torch.Generator().manual_seed(2))
    plan, y = plan_of(gshard_layer(16, 4, as_released=True), x, False)
    assert int(plan.kept[:, 1].sum()) < 0.2 * 128  # second gates are near 0, so few of them survive
    ours, z = plan_of(gshard_layer(16, 4), x, False)
    assert int(ours.kept[:, 1].sum()) > 0.6 * 128
    again = [plan_of(gshard_layer(16, 4, as_released=r), x, False, seed=7)[1] for r in (True, False)]
    assert not torch.equal(again[0], y)
    assert torch.equal(again[1], z)
    assert gshard_layer(as_released=True).losses[0].coefficient == 1.0


def test_experts_that_start_alike() -> None:
    for alike in (False, True):
        layer = switch_layer(4, 6, as_released=alike).build(8)
        for _ in range(2):
            for parameter in (layer.experts.up, layer.experts.down):
                assert bool((parameter == parameter[:1]).all()) is alike
            initialise(layer, 3)


@pytest.mark.parametrize("variant", ["A", "A released", "B", "C"])
def test_variants(variant: str) -> None:
    small: Any = {"num_experts": 4, "width": 6}
    if variant.startswith("A"):
        config = experts_on_top(ENCODER, gshard_layer(4, 6, as_released="released" in variant).replace(losses=()))
        if variant == "A":
            # room for everyone and no draw: the check compares batches of other shapes
            top: Any = config.top
            config = config.replace(top=top.replace(router=top.router.replace(limit=None)))
            check_headed(config)
        paths = {"top"}
    elif variant == "B":
        config = Headed(
            encoder=blocks_on_top(ENCODER, switch_layer(**small), count=2), head=experts_on_top(ENCODER).head
        )
        check_headed(config)
        assert config.encoder.num_layers == 4
        assert "norm.weight" in dict(config.build().encoder.named_parameters())  # the last block is pre-norm
        paths = {"encoder.layers.2.ffn", "encoder.layers.3.ffn"}
    else:
        config = Headed(encoder=experts_inside(ENCODER, {1}, switch_layer(**small)), head=experts_on_top(ENCODER).head)
        check_headed(config)
        paths = {"encoder.layers.1.ffn"}
    said, _, trail = config.build()(TOKENS)
    assert said.shape == (2, 9, 2)
    assert {key.path for key in trail} == paths


def test_a_block_that_is_not_there() -> None:
    with pytest.raises(UserError, match="there is no block 2"):
        experts_inside(ENCODER, {2})


@pytest.mark.parametrize(
    ("parts", "moves"),
    [
        (("encoder",), {"top", "head", "features"}),
        (("experts",), {"encoder", "top.router", "head", "features"}),
        (("encoder", "experts", "features"), {"top.router", "head"}),
        (("top", "head", "embed", "0:1"), {"encoder.layers.1", "encoder.norm", "features"}),
        (("routers", "norm", "1"), {"encoder.embed", "encoder.layers.0", "top.experts", "head", "features"}),
    ],
)
def test_parts_that_stand_still(parts: tuple[str, ...], moves: set[str]) -> None:
    """Two stages: what is frozen gets no gradient, what is thawed does again."""
    encoder = ENCODER.replace(norm_order="pre")
    model = experts_on_top(encoder, gshard_layer(4, 6)).replace(features=1).build()
    frozen = set(still(model, parts))
    for name, parameter in model.named_parameters():
        moving = any(name.startswith(f"{part}.") for part in moves)
        assert parameter.requires_grad is moving, name
        assert (name in frozen) is not moving
    thaw(model, parts)
    assert all(p.requires_grad for p in model.parameters())


def test_parts_that_are_not_there() -> None:
    with pytest.raises(UserError, match="has no top"):
        still(Headed(encoder=ENCODER).build(), ("top",))
    with pytest.raises(UserError, match="no experts"):
        still(Headed(encoder=ENCODER).build(), ("experts",))
    with pytest.raises(UserError, match="'middle' is no part; name embed"):
        still(Headed(encoder=ENCODER).build(), ("middle",))
