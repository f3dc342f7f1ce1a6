"""Runs of readers: the preset on a user's own questions, augmented, and with parts that stay as they are."""

from __future__ import annotations

from pathlib import Path

import torch

from moestro.models.config import EncoderDecoder
from moestro.models.expert_places import gshard_layer
from moestro.nn.config import Attention, PlainFeedForward
from moestro.tasks import SpanQuestions
from moestro.tasks.data import ByteVocabulary
from moestro.train.load import load
from moestro.train.presets import preset
from moestro.train.run import run
from train.task_cases import write


def test_the_preset_learns_from_a_users_questions(tmp_path: Path) -> None:
    """Everything but head, router and norm frozen: those move, no bit of the rest does."""
    file = write(tmp_path)["questions"]
    whole = preset("robust-qa-moe")
    encoder = whole.model.encoder.replace(  # type: ignore[union-attr]
        dim=8, num_layers=1, attention=Attention(num_heads=2, causal=False), ffn=PlainFeedForward(width=8)
    )
    config = whole.replace(
        model=whole.model.replace(encoder=encoder, top=gshard_layer(4, 6)),
        data=whole.data.at(str(file)).replace(vocabulary=ByteVocabulary(), stride=4),  # type: ignore[attr-defined]
        steps=2,
        eval_every=2,
        batch_size=4,
        seq_len=96,
        threads=1,
        twin=False,
        report=False,
        tensorboard=False,
        frozen=("encoder", "experts", "features"),
    )
    assert not isinstance(config.model, EncoderDecoder)
    run(config, out=tmp_path / "run")
    model = load(tmp_path / "run", state="last").model
    fresh = model.config.build()  # type: ignore[union-attr, operator]
    fresh.initialise(config.seed)
    old = fresh.state_dict()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, old[n])}
    assert moved == {"head.map.weight", "head.map.bias", "top.router.score.weight"}


def test_copies_of_training_questions_only(tmp_path: Path) -> None:
    file = write(tmp_path)["questions"]
    plain = SpanQuestions(path=str(file)).build()
    table = tmp_path / "table.tsv"
    table.write_text("red\tcrimson\ngreen\tlime\ncat\tkitten\n")
    more = SpanQuestions(path=str(file), copies=2, synonyms=str(table), deleted=0.0).build()
    assert (more.valid, more.test) == (plain.valid, plain.test)
    assert more.train[: len(plain.train)] == plain.train
    added = more.train[len(plain.train) :]
    assert added
    said = {word for q in added for word in q.context.split()} - {w for q in plain.train for w in q.context.split()}
    assert said == {"crimson", "lime", "kitten"}
    for q in added:
        assert q.context[q.answers[0].start :].startswith(q.answers[0].text)
