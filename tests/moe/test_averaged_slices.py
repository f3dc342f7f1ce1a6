"""SMoE-Dropout (41, arXiv 2303.01610): an average of small experts behind a frozen router, at any number of them."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.core.signals import Signals
from moestro.experts.config import MLP
from moestro.models.config import Decoder
from moestro.moe.config import MoELayer
from moestro.routers.config import Frozen, Linear, Router, SoftmaxKept, TopK

ROUTER = Router(score=Frozen(inner=Linear(bias=True)), select=TopK(k=4), weigh=SoftmaxKept())
LAYER = MoELayer(num_experts=4, router=ROUTER, experts=MLP(width=3, activation="relu", bias=True), losses=())


def each(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """[T, E, D]: W2_e relu(W1_e x + b1_e) + b2_e."""
    bank = layer.experts
    hidden = (torch.einsum("efd,td->tef", bank.up, x) + bank.up_bias).relu()
    return torch.einsum("edf,tef->ted", bank.down, hidden) + bank.down_bias


def made() -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = LAYER.build(dim=5).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))
    return layer, torch.randn(7, 5, dtype=torch.float64, requires_grad=True)


def test_all_experts_are_weighted_by_a_softmax_of_all_logits() -> None:
    """K = N: y = sum_e softmax(l)_e f_e(x); with l = 0 the plain mean. K = 2: the softmax over the two kept ones."""
    layer, x = made()
    score = layer.router.score.inner
    logits = x @ score.weight.T + score.bias
    torch.testing.assert_close(layer(x)[0], (logits.softmax(-1)[..., None] * each(layer, x)).sum(1))
    best = logits.topk(2)
    kept = torch.zeros_like(logits).scatter(1, best.indices, best.values.softmax(-1))
    two = layer(x, Signals(knobs={"top_k": 2}))[0]
    torch.testing.assert_close(two, (kept[..., None] * each(layer, x)).sum(1))
    with torch.no_grad():
        score.weight.zero_()
        score.bias.zero_()
    torch.testing.assert_close(layer(x)[0], each(layer, x).mean(1))


def test_the_router_stands_still_and_x_learns_through_its_weights() -> None:
    layer, x = made()
    with torch.no_grad():  # experts whose output is constant: only the weights depend on x
        layer.experts.up.zero_()
    layer(x)[0].square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in layer.router.parameters())


def test_another_k_is_that_of_every_layer_and_of_this_call_only() -> None:
    model = Decoder(vocab_size=11, dim=8, num_layers=3, layout=("moe", "dense", "moe"), moe=LAYER, context=8).build()
    tokens = torch.arange(8)[None]
    for k in (1, 3, None):
        signals = Signals(knobs={} if k is None else {"top_k": k})
        plans = model(tokens, signals)[2].plans().values()
        assert [plan.expert.shape[1] for plan in plans] == [k or 4] * 2
