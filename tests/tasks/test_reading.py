"""Answers of a reader: texts, scores by domain, and which experts met which domain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moestro.core.carry import Carry
from moestro.core.trail import Trail
from moestro.models.config import Encoder, Headed
from moestro.models.expert_places import experts_on_top, gshard_layer
from moestro.nn.config import Attention
from moestro.tasks.data.config import WordVocabulary
from moestro.tasks.data.examples import Answer, SpanQuestion
from moestro.tasks.data.windows import make_windows
from moestro.tasks.reading import answer, scores_by_domain

CONTEXT = "The mill of number {} was built in 19{} by the old miller."
QUESTIONS = [
    SpanQuestion(str(i), "When was it built?", text, (Answer(f"19{i}", text.index(f"19{i}")),), domain=i % 2)
    for i in range(10, 16)
    if (text := CONTEXT.format(i, i))
]
VOCABULARY = WordVocabulary(size=64).build([q.context for q in QUESTIONS] + ["When was it built?"])
WINDOWS = make_windows(QUESTIONS, VOCABULARY, 32, 4)


class Knowing(nn.Module):
    """Points at the year: the token after "in"."""

    config = Headed(features=0)

    def forward(self, tokens: Any, *_: Any) -> Any:
        after = (tokens == VOCABULARY.encode("in")[0]).roll(1, dims=1)
        return 9.0 * after[..., None].expand(-1, -1, 2).float(), Carry(), Trail()


def test_what_a_knowing_model_answers() -> None:
    found = answer(Knowing(), QUESTIONS, WINDOWS, VOCABULARY, batch_size=4)
    assert found.texts == [f"19{i}" for i in range(10, 16)]
    assert found.usage == {}
    assert found.nats == pytest.approx(0.0, abs=0.01)


def test_scores_by_domain_by_hand() -> None:
    texts = ["1910", "", "in 1912", "1913", "nothing", "1915"]
    found = scores_by_domain(QUESTIONS, texts)
    # domain 0: right, 2/3 of F1 ("in 1912"), wrong; domain 1: wrong, right, right
    assert found[0] == pytest.approx((100 / 3, 100 * (1 + 2 / 3) / 3))
    assert found[1] == pytest.approx((200 / 3, 200 / 3))


def test_experts_are_counted_by_domain() -> None:
    encoder = Encoder(
        vocab_size=VOCABULARY.size, dim=8, num_layers=1, attention=Attention(num_heads=2, causal=False), context=32
    )
    model = experts_on_top(encoder, gshard_layer(4, 6)).replace(features=1).build()
    found = answer(model, QUESTIONS, WINDOWS, VOCABULARY, batch_size=4)
    tokens = [sum(len(w.ids) for w in WINDOWS if w.domain == d) for d in (0, 1)]
    assert found.usage["top"].sum(1).tolist() == [2 * n for n in tokens]  # two choices each, padding none
    assert model.training
    assert all(text in q.context for text, q in zip(found.texts, QUESTIONS))
    assert torch.tensor(found.nats).isfinite()
