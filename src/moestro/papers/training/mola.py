"""Data, training and evaluation of the comparison 32 MoLA."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...adapt.attach import attach
from ...adapt.mixture.balance import diversity, watch
from ...optim.config import AdamW
from ...tasks.answers import answer_loss
from ...tasks.config import NextToken
from ...tasks.data.batches import ExampleBatches
from ...tasks.data.collate import AnswerTexts
from ...tasks.data.config import Banking77, BpeVocabulary, Gutenberg
from ...tasks.data.streams import DomainBatches
from ...trace.metrics import load_entropy
from ...train.files import read_tensors, write_tensors
from ...train.weights import load_weights, tensors_of
from ..fit import fit
from ..mola import BASE_UPDATES, BATCH, S, adapter, base
from ..paper import Job, Outcome


@dataclasses.dataclass(frozen=True)
class Texts:
    """books: plain text for the base model. queries: what it is then tuned on."""

    books: Any
    queries: Any
    vocabulary: Any


def data(folder: Path) -> Texts:
    books = Gutenberg(folder=str(folder / Gutenberg.slug)).build()
    queries = Banking77(folder=str(folder / Banking77.slug)).build().limited(valid=300, test=1000)
    queries = dataclasses.replace(queries, labels=tuple(name.replace("_", " ") for name in queries.labels))
    texts = [p.text[:200_000] for p in books.train] + [f"{q.text} {queries.labels[q.label]}" for q in queries.train]
    with TemporaryDirectory() as cache:
        return Texts(books, queries, BpeVocabulary(size=1024, cache=cache).build(texts))


def sample(folder: Path) -> None:
    for data in (Gutenberg, Banking77):
        (folder / data.slug).mkdir()
    (folder / Gutenberg.slug / "fiction_fox.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    row = '{"split": "%s", "text": "Where is my %s, number %d?", "label": "%s_arrival"}\n'
    rows = [row % (s, t, i, t) for s in ("train", "test") for t in ("card", "cash") for i in range(12)]
    (folder / Banking77.slug / "banking77.jsonl").write_text("".join(rows))


def prepare(job: Job) -> None:
    """The base model, trained on plain text."""
    model = base(job.smoke).replace(seed=job.seed).build()
    batches = DomainBatches(job.data.books, job.data.vocabulary, 2 * S, seed=job.seed)
    updates = job.updates if job.smoke else BASE_UPDATES
    alone = dataclasses.replace(job, updates=updates, lr=4e-3, tick=lambda made: None)
    fit(model, NextToken().build(), lambda step: batches.train(step, BATCH), alone)
    write_tensors(job.shared / "base.safetensors", tensors_of(model))


def train(job: Job) -> Outcome:
    file, queries = job.shared / "base.safetensors", job.data.queries
    collate = AnswerTexts(job.data.vocabulary, S, queries.labels)
    part = {name: ExampleBatches(getattr(queries, name), collate, job.seed) for name in ("train", "valid", "test")}
    model = base(job.smoke).build()
    load_weights(model, read_tensors(file), file)
    with torch.no_grad():
        given = part["train"].train(0, BATCH).tokens
        before = model(given)[0]
        attach(model, adapter(job.arm.options, job.seed))
        moved = float((model(given)[0] - before).abs().max())
    batch = lambda step: part["train"].train(step, BATCH)  # noqa: E731
    fit(model, NextToken().build(), batch, job, optimizer=AdamW(weight_decay=0.0))
    with watch(model) if "experts" in job.arm.options else contextlib.nullcontext() as routing:
        valid = answer_loss(model, part["valid"])
    test = answer_loss(model, part["test"])
    figures = {"nats": nats(test), "accuracy": test.exact, "start": moved}
    curves = {}
    if routing is not None:
        apart = [found.distance for found in diversity(model).values()]
        loads = [float(load_entropy(n.numpy())) for n in routing.loads().values()]
        half = len(apart) // 2
        figures |= {"diversity": sum(apart[half:]) / sum(apart[:half]), "load": sum(loads) / len(loads)}
        curves = {"diversity": list(enumerate(apart, 1)), "load": list(enumerate(loads, 1))}
    return Outcome(validation=nats(valid), test=figures, curves=curves)


def nats(found: Any) -> float:
    return float(found.nats.sum() / found.tokens.sum())
