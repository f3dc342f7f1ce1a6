"""Every router and every loss of the published systems in a decoder, an encoder with a head, and an encoder-decoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.experts import Gated
from moestro.losses import (
    Loss,
    MutualInformation,
    RoutingEntropy,
    SpecifiedExpert,
    SwitchBalance,
    ZLoss,
)
from moestro.models import Decoder, Encoder, EncoderDecoder, Headed
from moestro.models.heads_config import ClassHead
from moestro.moe import MoELayer
from moestro.nn import Attention, CrossAttention, FeedForward
from moestro.routers import (
    AttentionMix,
    Capacity,
    Constant,
    FirstChoices,
    Frozen,
    Label,
    Random,
    RandomSecond,
    Raw,
    Router,
    SimilarityMix,
    SoftmaxKept,
    TopP,
    Uniform,
)
from moestro.routers.examples import examples
from moestro.tasks.config import Classify, NextToken, Objective, Translate, TwoPass
from moestro.tasks.data.batches import LabelBatch, TranslationBatch
from moestro.tasks.data.streams import DomainBatch
from moestro.testing.compare import assert_close

B, S, V, E = 3, 7, 29, 4


def drawn(**options: Any) -> Router:
    return Router(score=Uniform(), select=Random(**options), weigh=Constant())


ROUTERS: dict[str, Router] = {
    "top-2": Router(),
    "random per token": drawn(k=2),
    "random per sentence": drawn(level="sequence"),
    "random per batch": drawn(level="batch"),
    "mix by similarity": Router(mix=SimilarityMix()),
    "mix by attention": Router(mix=AttentionMix()),
    "random second, capacity": Router(limit=RandomSecond(then=Capacity(factor=1.0, min_capacity=2))),
    "random second, GShard's order": Router(limit=RandomSecond(then=Capacity(priority=FirstChoices()))),
    "top-p": Router(select=TopP(p=0.4), weigh=Raw()),
    "frozen random": Router(score=Frozen(), weigh=SoftmaxKept()),
    "by label": Router(score=Uniform(), select=Label(), weigh=Constant()),
    **{name: router for name, router in examples().items() if name.startswith("sentence")},
}
LOSSES: tuple[Loss, ...] = (
    SwitchBalance(coefficient=0.1),
    RoutingEntropy(coefficient=0.1),
    ZLoss(coefficient=0.1),
    MutualInformation(coefficient=0.1),
    SpecifiedExpert(coefficient=0.1),
)
MODELS = "decoder", "encoder with a head", "encoder-decoder"


def built(kind: str, router: Router, losses: tuple[Loss, ...] = LOSSES, noncausal: bool = False) -> Any:
    """The model with one routed block on every side."""
    moe = MoELayer(num_experts=E, router=router, experts=Gated(width=6), losses=losses)
    sizes: dict[str, Any] = {
        "vocab_size": V,
        "dim": 8,
        "num_layers": 1,
        "moe": moe,
        "ffn": FeedForward(width=8),
        "context": 16,
        "dropout": 0.1,
        "init_std": 0.3,
    }
    seen, encoder = Attention(num_heads=2), Encoder(**sizes, attention=Attention(num_heads=2, causal=False))
    if kind == "decoder":
        return Decoder(**sizes, attention=seen, allow_noncausal=noncausal).build()
    if kind == "encoder with a head":
        return Headed(encoder=encoder, head=ClassHead(num_classes=3)).build()
    cross = CrossAttention(num_heads=2)
    decoder = Decoder(**sizes, attention=seen, allow_noncausal=noncausal, cross=cross)
    return EncoderDecoder(encoder=encoder, decoder=decoder).build()


def given(kind: str) -> tuple[Any, Objective]:
    """A batch of two domains, with padding where there can be some, and what is learnt from it."""
    draw = torch.Generator().manual_seed(4)
    tokens, source = (torch.randint(0, V, (B, S + 1), generator=draw) for _ in range(2))
    domain, valid = torch.tensor([0, 1, 0]), torch.ones(B, S, dtype=torch.bool)
    units = torch.arange(B * S)
    targets = tokens[:, 1:].clone()
    if kind == "decoder":
        text = DomainBatch(tokens=tokens[:, :-1], targets=targets, unit_id=units, text_bytes=1.0, domain=domain)
        return text, NextToken()
    valid[-1, -2:] = False
    if kind == "encoder with a head":
        labels = torch.tensor([2, 0, 1])
        return LabelBatch(tokens=tokens[:, 1:], valid=valid, labels=labels, domain=domain, unit_id=units), Classify()
    pairs = TranslationBatch(
        source=source[:, 1:],
        source_valid=valid,
        source_unit_id=units + 1000,
        tokens=tokens[:, :-1],
        targets=torch.where(valid, targets, -1),
        valid=valid,
        domain=domain,
        unit_id=units,
    )
    return pairs, Translate()


def routers_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for m in model.modules() if hasattr(m, "router") for p in m.router.parameters() if p.requires_grad]  # type: ignore[union-attr]


def check_gradients(model: nn.Module, loss: Tensor) -> None:
    """A finite loss, and a finite gradient that is not zero for all that trains."""
    assert bool(torch.isfinite(loss))
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name}: no gradient"
            assert bool(torch.isfinite(p.grad).all()), f"{name}: the gradient is not finite"
            assert bool(p.grad.any()), f"{name}: a gradient of zeros"


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_router_with_every_loss(kind: str, router: str) -> None:
    config = ROUTERS[router]
    causal = config.build(dim=8, num_experts=E).causal
    if kind != "encoder with a head" and not causal:
        with pytest.raises(UserError, match="is not causal"):
            built(kind, config)
    model = built(kind, config, noncausal=not causal).train()
    batch, objective = given(kind)
    signals = Signals(seed=9, progress=0.5)
    moves = routers_of(model)

    out = objective.build()(model, batch, signals)
    task = out.loss / out.count
    terms = out.trail.terms()
    assert len(terms) == len(LOSSES) * (2 if kind == "encoder-decoder" else 1)
    for key, term in terms.items():
        value = term.value()
        assert bool(torch.isfinite(value)), key
        if moves:  # the loss alone moves the router of its layer
            own = [p for p in model.get_submodule(key.path).router.parameters() if p.requires_grad]
            grads = torch.autograd.grad(value, own, retain_graph=True, allow_unused=True)
            assert any(g is not None and bool(g.any()) for g in grads), key
            assert all(g is None or bool(torch.isfinite(g).all()) for g in grads), key
    check_gradients(model, task + out.trail.loss())

    both = TwoPass(inner=objective).build()(model, batch, signals)
    assert len(both.trail.terms()) == 2 * len(terms)
    assert float(both.metrics["consistency"]) > 0  # dropout and draws tell the passes apart
    check_gradients(model, both.loss / both.count + both.trail.loss())
    if causal and kind != "encoder with a head":
        check_causality(model, batch, kind)


def check_causality(model: Any, batch: Any, kind: str) -> None:
    """No logit depends on later tokens, in training with its draws and in evaluation.

    The last sequence is changed: room in experts is shared, and given to the sequences in order.
    """

    def logits(tokens: Tensor) -> Tensor:
        given = dataclasses.replace(batch, tokens=tokens)
        inner = (NextToken() if kind == "decoder" else Translate()).build()
        return inner.predict(model, given, Signals(seed=9, progress=0.5))[0][0].logits.view(B, S, V)

    later = batch.tokens.clone()
    later[-1, 4:] = (later[-1, 4:] + 1) % V
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            before, after = logits(batch.tokens), logits(later)
        assert_close("logits before the change", after[-1, :4], before[-1, :4], 1e-5)
        assert_close("earlier sequences", after[:-1], before[:-1], 1e-5)
        assert not torch.equal(after[-1, 4:], before[-1, 4:])


@pytest.mark.parametrize("kind", MODELS)
def test_what_has_no_label_is_refused(kind: str) -> None:
    """A router and losses that read a domain say so where nobody gives one."""
    batch, _ = given(kind)
    tokens = batch.tokens
    for router, losses in ((ROUTERS["by label"], ()), (ROUTERS["top-2"], (MutualInformation(coefficient=1.0),))):
        model = built(kind, router, losses).train()
        args = (batch.source, tokens) if kind == "encoder-decoder" else (tokens,)
        with pytest.raises(UserError, match=r"label|task"):
            model(*args)


def test_pairs_without_a_meaning_are_refused() -> None:
    one = MutualInformation(coefficient=1.0, num_tasks=1)
    batch, objective = given("decoder")
    model, call = built("decoder", Router(), (one,)).train(), objective.build()
    with pytest.raises(UserError, match="num_tasks"):
        call(model, batch, Signals())
    with pytest.raises(UserError, match="listed twice"):
        built("decoder", Router(), (ZLoss(), ZLoss(coefficient=0.5)))
    with pytest.raises(UserError, match="makes weights of logits"):
        Router(mix=SimilarityMix(), weigh=SoftmaxKept())
