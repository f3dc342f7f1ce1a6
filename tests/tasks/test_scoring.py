"""Bits per byte and shares of right answers of models that always say the same; routing at several moments."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.models.config import Decoder, Encoder, Headed
from moestro.models.heads_config import ClassHead
from moestro.moe.config import MoELayer
from moestro.nn.config import Attention
from moestro.routers.config import Raw, Router, TopK
from moestro.tasks.config import Classify, NextToken
from moestro.tasks.data.batches import ExampleBatches
from moestro.tasks.data.collate import LabelTexts
from moestro.tasks.data.config import ByteVocabulary
from moestro.tasks.data.examples import DataSet, Labelled, Passage
from moestro.tasks.data.streams import DomainBatches
from moestro.tasks.routing_probe import RoutingProbe
from moestro.tasks.scoring import domain_bits, share_right

TEXT = tuple(Passage("ab" * 40, domain) for domain in (0, 1))
DATA = DataSet("made up", TEXT, (Passage("ab" * 20), Passage("é" * 20, 1)), domains=("ascii", "accents", "none"))


def data() -> DomainBatches:
    return DomainBatches(DATA, ByteVocabulary().build(()), 8)


def test_a_model_that_knows_nothing_says_the_log_of_its_vocabulary() -> None:
    """40 bytes and eos: five windows of 8 tokens each stand for 40 * 40 / 41 bytes."""
    model = Decoder(vocab_size=262, dim=8, num_layers=1, context=8).build()
    with torch.no_grad():
        model.head.weight.zero_()
    found = domain_bits(model.train(), data(), size=2)
    assert found == pytest.approx({"ascii": math.log2(262) * 41 / 40, "accents": math.log2(262) * 41 / 40})
    assert model.training


def test_signals_reach_the_routers() -> None:
    model = Decoder(vocab_size=262, dim=8, num_layers=1, context=8, moe=MoELayer(num_experts=4)).build()
    one, same, four = (domain_bits(model, data(), signals=Signals(knobs={"top_k": k})) for k in (2, 2, 4))
    assert one == same == domain_bits(model, data(), limit=99)
    assert one != four
    assert domain_bits(model, data(), limit=1) != one


def test_share_of_right_answers() -> None:
    encoder = Encoder(vocab_size=262, dim=8, num_layers=1, attention=Attention(num_heads=2, causal=False))
    model = Headed(encoder=encoder, head=ClassHead(num_classes=3)).build()
    with torch.no_grad():
        model.head.map.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))  # always class 1
    rows = [Labelled("a" * (1 + i), label) for i, label in enumerate((1, 0, 1, 2, 1, 1))]
    texts = ExampleBatches(rows, LabelTexts(ByteVocabulary().build(()), 8))
    assert share_right(model.train(), Classify().build(), texts, size=4) == pytest.approx(4 / 6)
    assert model.training


def test_choices_at_several_moments() -> None:
    """Nothing changes; then the router's rows change places, and every set of one of two experts does."""
    moe = MoELayer(num_experts=2, router=Router(select=TopK(k=1), weigh=Raw()), losses=())
    model = Decoder(vocab_size=262, dim=8, num_layers=1, context=8, moe=moe).build()
    probe = RoutingProbe(model, NextToken().build(), data().held_out(0, 4)[0])
    first = probe.look()
    with pytest.raises(UserError, match="1 looks"):
        probe.fluctuation()
    assert probe.look() == first
    assert probe.fluctuation() == 0.0
    with torch.no_grad():
        weight = model.layers[0].ffn.router.score.weight
        weight.copy_(weight.flip(0))
    (certain,) = probe.look().values()
    assert probe.fluctuation() == 0.5
    assert 0 < certain.mean <= certain.highest <= math.log(2)
    assert model.training
