"""Counted parameters and FLOPs against the built model and torch's FlopCounterMode, on asymmetric shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flop_cases import counter
from moestro.core.account import Cost, breakdown, cost
from moestro.experts import Gated
from moestro.models import Decoder, examples
from moestro.moe import GateMerge, MoELayer
from moestro.nn import Attention, FeedForward
from moestro.nn.init import initialise
from moestro.routers import All, Router, TopK

B, S = 2, 13
ODD = Decoder(
    vocab_size=53,
    dim=18,
    num_layers=3,
    layout=("moe", "dense", "moe"),
    num_experts=(5, 3),
    attention=Attention(num_heads=3, num_kv_heads=1, head_dim=10, qk_norm="head"),
    ffn=FeedForward(width=23),
    moe=MoELayer(router=Router(select=TopK(k=2)), experts=Gated(width=7), shared=Gated(width=11), merge=GateMerge()),
    context=S,
)
CONFIGS = {**examples(), "odd": ODD, "odd_tied": ODD.replace(tied=True)}


def tokens(config: Decoder, n: int) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (B, n), generator=torch.Generator().manual_seed(0))


def in_whole_numbers(config: Decoder) -> int:
    """FLOPs per token that are lost where a count is rounded down: a sink costs one more query per sequence, not per
    token, so three products with it and what is computed again are each less than one short."""
    return 4 * sum(isinstance(b.mixer, Attention) and b.mixer.sinks for b in config.resolved())


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_the_built_model(name: str) -> None:
    config = CONFIGS[name]
    model = config.build()
    assert config.num_params() == sum(p.numel() for p in model.parameters())
    assert cost(model).params == config.num_params(), "the meta device counts the same"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("n", [7, S])
def test_forward_flops(name: str, n: int) -> None:
    config = CONFIGS[name]
    model = config.build().eval()
    with torch.no_grad(), counter() as count:
        model(tokens(config, n))
    short = count.get_total_flops() - config.flops_per_token(n) * B * n
    assert 0 <= short <= in_whole_numbers(config) * B * n


@pytest.mark.parametrize("name", CONFIGS)
def test_training_flops(name: str) -> None:
    config = CONFIGS[name].replace(checkpoint=False)
    model = config.build()
    x = tokens(config, S)
    with counter() as count:
        total, _, _, trail = model.loss(x, x)
        (total + trail.loss()).backward()
    short = count.get_total_flops() - config.flops_per_token(S, "train") * B * S
    assert 0 <= short <= in_whole_numbers(config) * B * S


def test_active_parameters_by_hand() -> None:
    D, d, heads = 18, 10, 3
    attention = D * heads * d + 2 * D * d + heads * d * D + 2 * d
    norms = 2 * D
    shared = 3 * D * 11 + D
    routed = 2 * 3 * D * 7 + shared
    want = 2 * 53 * D + 3 * (attention + norms) + D + 3 * D * 23 + (5 * D + routed) + (3 * D + routed)
    assert ODD.num_active_params() == want
    assert ODD.num_params() == want + (5 - 2 + 3 - 2) * 3 * D * 7
    assert ODD.replace(tied=True).num_params() == ODD.num_params() - 53 * D
    assert ODD.replace(tied=True).flops_per_token(S) == ODD.flops_per_token(S), "a tied head multiplies all the same"


def test_dense_selection_is_all_active() -> None:
    config = ODD.replace(moe=MoELayer(router=Router(select=All()), experts=Gated(width=7)))
    assert config.num_active_params() == config.num_params()


def test_flops_of_one_layer_by_hand() -> None:
    layer = MoELayer(num_experts=6, router=Router(select=TopK(k=3)), experts=Gated(width=5), shared=Gated(width=4))
    assert layer.flops_per_token(1, dim=10) == 2 * (6 * 10 + 3 * 3 * 10 * 5 + 3 * 10 * 4)


def test_training_counts_the_scores_again() -> None:
    config = Attention(num_heads=2, head_dim=4)
    matrices = 4 * 8 * 8 * 2
    assert config.flops_per_token(5, dim=8) == matrices + 4 * 8 * 5
    assert config.flops_per_token(5, "train", dim=8) == 3 * matrices + 14 * 8 * 5


def test_breakdown_adds_up() -> None:
    model = ODD.build()
    lines = {line.path: line for line in breakdown(model, S)}
    total = lines[""].cost
    assert total == cost(model, S)
    parts = [lines[n].cost for n in ("embed", "layers", "norm", "head")]
    assert sum(parts, Cost(0, 0, 0)) == total
    assert lines[""].bytes == 4 * total.params
    assert lines["layers.0.ffn"].kind == "MoELayer"


def test_costs_add() -> None:
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 40) == Cost(11, 22, 33, 44)
    assert Cost(0, 0, 10, 1).train_flops == 31


def test_initialisation_does_not_change_the_count() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    initialise(model)
    assert cost(model) == Cost(30, 30, 50)
