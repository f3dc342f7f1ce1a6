"""Task loss, recall and reasoning on (prompt, answer) pairs (brief 39), by hand and on models that know the answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moestro.core.errors import UserError
from moestro.models import Decoder, examples
from moestro.models.ensemble import ensemble
from moestro.tasks.probes import (
    Example,
    TaskLoss,
    few_shot,
    generalisation_gap,
    memorisation,
    reasoning,
    task_loss,
)
from moestro.tasks.tokenizer import Bytes, Encoded

CONFIG = examples()["moe"].replace(vocab_size=256, context=96, init_std=0.2)
PAIRS = [Example("2+2=", "4"), Example("The capital of France is ", "Paris."), Example("ü", "ñandú")]


def test_brief_39_a_uniform_model_loses_log2_v_bits_per_token():
    model = CONFIG.build()
    torch.nn.init.zeros_(model.head.weight)
    loss = task_loss(model, Bytes(), PAIRS)
    assert loss.bits_per_token == pytest.approx(math.log2(256), rel=1e-6)
    assert loss.bits_per_byte == pytest.approx(8, rel=1e-6)  # one byte per token
    assert loss.tokens.tolist() == loss.bytes.tolist() == [1, 6, 7]


@pytest.mark.parametrize("tokens_per_pass", [1, 40, 8192])
def test_task_loss_against_one_example_at_a_time(tokens_per_pass):
    """Padding and grouping change nothing; averages are over examples."""
    model = CONFIG.build().train()
    loss = task_loss(model, Bytes(), PAIRS, tokens_per_pass=tokens_per_pass)
    assert model.training
    model.eval()
    each = []
    for prompt, answer in PAIRS:
        ids = torch.tensor(list((prompt + answer).encode()))
        n = len(prompt.encode())
        with torch.no_grad():
            logits = model(ids[None, :-1])[0][0]
        each.append(float(F.cross_entropy(logits[n - 1 :], ids[n:], reduction="sum")))
    assert loss.nats.tolist() == pytest.approx(each, rel=1e-5)
    assert loss.bits_per_token == pytest.approx(sum(x / n for x, n in zip(each, (1, 6, 7))) / 3 / math.log(2), rel=1e-5)


class Pairs:
    """Tokens of two bytes, the last one of what is left; ids are hashes."""

    vocab_size, separator, key = 256, 0, "pairs"

    def encode(self, text: bytes) -> Encoded:
        parts = [text[i : i + 2] for i in range(0, len(text), 2)]
        return Encoded(np.array([sum(p) % 256 for p in parts]), np.array([len(p) for p in parts]))

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))

    def to_json(self) -> str:
        return ""


def test_a_token_across_the_boundary_belongs_to_the_answer():
    """abc|def is ab cd ef: the answer has two tokens and three bytes; as released, one token."""
    model = CONFIG.build()
    ours, theirs = (task_loss(model, Pairs(), [("abc", "def")], as_released=r) for r in (False, True))
    assert (ours.tokens.item(), ours.bytes.item()) == (2, 3)
    assert (theirs.tokens.item(), theirs.bytes.item()) == (1, 3)
    ids = torch.from_numpy(Pairs().encode(b"abcdef").ids)
    with torch.no_grad():
        scores = model.eval()(ids[None, :-1])[0][0].log_softmax(-1)
    each = [-float(scores[i, ids[i + 1]]) for i in (0, 1)]
    assert ours.nats.item() == pytest.approx(sum(each), rel=1e-5)
    assert theirs.nats.item() == pytest.approx(each[1], rel=1e-5)
    with pytest.raises(UserError, match="no token of its own"):
        task_loss(model, Pairs(), [("abc", "d")], as_released=True)


def test_an_answer_without_a_prompt_follows_the_separator():
    model = CONFIG.build()
    alone, after = (task_loss(model, Bytes(), [(p, "word")]) for p in ("", "\0"))
    assert alone.nats.item() == pytest.approx(after.nats.item(), rel=1e-6)


def test_what_cannot_be_probed():
    model = CONFIG.build()
    for pairs, said in (
        ([], "at least one"),
        ([("a", "b"), ("a", "")], "answer of example 1 is empty"),
        ([("a" * 96, "b" * 2)], "example 0 has 98 tokens, the model's context is 96"),
    ):
        with pytest.raises(UserError, match=said):
            task_loss(model, Bytes(), pairs)
    with pytest.raises(UserError, match="problem 0 has no number"):
        reasoning(model, Bytes(), [("a", "none")])
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        task_loss(model, Bytes(), PAIRS)


def test_the_gap_is_held_out_minus_trained():
    one = torch.ones(2, dtype=torch.int64)
    train, held = (
        TaskLoss(nats=torch.tensor(n).double() * math.log(2), tokens=2 * one, bytes=4 * one, right=one)
        for n in ([4.0, 8.0], [8.0, 16.0])
    )
    assert generalisation_gap(train, held) == pytest.approx(3 - 1.5)
    assert generalisation_gap(train, held, "token") == pytest.approx(6 - 3)


def test_shots_come_before_every_prompt():
    assert few_shot([("q2:", " b"), ("q3:", " c")], [("q1:", " a")], "\n") == [
        Example("q1: a\nq2:", " b"),
        Example("q1: a\nq3:", " c"),
    ]


def learn(model, text: str, steps: int = 40):
    ids = torch.tensor(list(text.encode()))[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(ids[:, :-1], ids[:, 1:])[0]
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def taught():
    model = Decoder(vocab_size=256, dim=32, num_layers=1, context=96).build()
    return learn(model, "Q: 12*3? 12*3 = 36 #### 36\n\n")


def test_memorisation_is_what_greedy_decoding_recites(taught):
    from moestro.serve.generate import generate

    known, other = Example("Q: 12*3?", " 12*3 = 36 #### 36"), Example("Q: 12*3?", " 12*3 = 99")
    recall = memorisation(taught, Bytes(), [known, other])
    wrote = bytes(generate(taught, list(known.prompt.encode()), 18).tokens.tolist()).decode()
    assert wrote == known.answer
    assert recall.exact == 0.5
    assert 0.5 < recall.tokens < 1
    assert recall.loss.nats[0] < recall.loss.nats[1]


def test_reasoning_reads_losses_and_the_number_that_the_model_writes(taught):
    right, wrong = ("Q: 12*3?", " 12*3 = 36 #### 36"), ("Q: 12*3?", " 12*3 = 99 #### 99")
    found = reasoning(taught, Bytes(), [right, wrong], max_new_tokens=30)
    assert found.texts == (right[1], right[1])
    assert found.accuracy == 0.5
    assert found.final.tokens.tolist() == [3, 3]  # " 36" after the mark
    assert found.final.nats[0] < found.final.nats[1]
    assert bool((found.final.nats < found.solution.nats).all())
    losses = reasoning(taught, Bytes(), [right], max_new_tokens=0)
    assert losses.accuracy is None
    assert losses.final.nats[0] == pytest.approx(float(found.final.nats[0]), rel=1e-4)


def test_probes_take_ensembles(taught):
    both = ensemble([taught, taught])
    assert memorisation(both, Bytes(), [("Q: 12*3?", " 12*3 = 36")]).exact == 1
