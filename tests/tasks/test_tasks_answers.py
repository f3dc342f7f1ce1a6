"""Loss of answers in batches, against one example at a time."""

from __future__ import annotations

import pytest
import torch

from moestro.models.config import Decoder
from moestro.nn.config import Attention, FeedForward
from moestro.tasks.answers import answer_loss
from moestro.tasks.data.batches import ExampleBatches
from moestro.tasks.data.collate import AnswerTexts
from moestro.tasks.data.config import ByteVocabulary
from moestro.tasks.data.examples import Labelled


def test_answers_of_batches_one_by_one() -> None:
    vocabulary = ByteVocabulary().build(())
    rows = [Labelled("where is it?", 1), Labelled("no", 0), Labelled("a card that was lost", 1)]
    batches = ExampleBatches(rows, AnswerTexts(vocabulary, 48, ("refund", "é")))
    model = Decoder(
        vocab_size=vocabulary.size, dim=16, num_layers=1, attention=Attention(num_heads=2), ffn=FeedForward(width=16)
    ).build()
    with torch.no_grad():
        model.head.weight[vocabulary.eos] *= 30  # the end is said where nothing else should be
    found = answer_loss(model, batches, size=2)
    assert model.training
    assert found.tokens.tolist() == [3, 7, 3]  # bytes of the name, and the end
    assert found.bytes.tolist() == [2, 6, 2]
    for i, (text, name) in enumerate((("where is it?", "é"), ("no", "refund"), ("a card that was lost", "é"))):
        prompt = [vocabulary.bos, *vocabulary.encode(f"{text}\n-> ")]
        said = [*vocabulary.encode(name), vocabulary.eos]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + said]))[0][0].double()
        nats, right = 0.0, 0
        for place, token in enumerate(said, len(prompt) - 1):
            nats -= float(torch.log_softmax(logits[place], -1)[token])
            right += int(logits[place].argmax()) == token
        assert float(found.nats[i]) == pytest.approx(nats, rel=1e-5)
        assert int(found.right[i]) == right
    assert int(found.right.sum()) > 0
