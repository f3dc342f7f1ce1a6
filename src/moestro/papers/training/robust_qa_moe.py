"""Data, training and evaluation of the comparison 13, robust question answering."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import torch

from ...tasks.config import FindSpan
from ...tasks.data.augment import Eda, augmented
from ...tasks.data.batches import ExampleBatches
from ...tasks.data.config import CovidQA, SquadShifts, WordVocabulary
from ...tasks.data.spans import shorten
from ...tasks.data.synonyms import neighbours
from ...tasks.data.windows import SpanWindows, make_windows
from ...tasks.reading import answer, scores_by_domain
from ...trace.independence import independence
from ..fit import fit
from ..paper import Arm, Job, Outcome
from ..robust_qa_moe import BASE_LR, BASE_UPDATES, BATCH, DOMAINS, LENGTH, SECOND, SIZES, VOCABULARY, WORDS, arms


def load(folder: Path) -> dict[str, Any]:
    """Windows for training, plain and with augmented copies; questions with their windows for evaluation."""
    train: list[Any] = []
    whole: list[str] = []
    held: dict[str, list[Any]] = {"valid": [], "test": []}
    for number, name in enumerate(DOMAINS):
        at = str(folder / ("covid_qa" if name == "covid_qa" else "squadshifts"))
        config = CovidQA(folder=at) if name == "covid_qa" else SquadShifts(domains=(name,), folder=at)
        found = config.replace(validation=0.1, test=0.2).build().limited(*SIZES[name])
        whole += [text for q in found.train for text in (q.context, q.question)]
        cut = {s: [shorten(q._replace(domain=number), WORDS) for q in getattr(found, s)] for s in ("train", *held)}
        train += cut["train"]
        for split in held:
            held[split] += cut[split]
    texts = list(dict.fromkeys(whole))
    vocabulary = WordVocabulary(size=VOCABULARY).build(texts)
    table = neighbours(texts, least_count=3 if len(texts) < 100 else 10, least_similarity=0.4)
    few = [q for q in train if q.domain]
    copies = [copy for q in few for copy in augmented(q, Eda(synonyms=0.3, deletions=0.1, copies=8), table)]

    def cut_up(questions: list[Any], answered: bool = False) -> list[Any]:
        return make_windows(questions, vocabulary, LENGTH, 32, answered)

    return {
        "vocabulary": vocabulary,
        "known": cut_up([q for q in train if not q.domain], True),
        "few": cut_up(few, True),
        "copies": cut_up(copies, True),
        **{split: (questions, cut_up(questions)) for split, questions in held.items()},
    }


def sample(folder: Path) -> None:
    """Twelve contexts of a domain with a question each."""
    for name in DOMAINS:
        rows = []
        for i in range(12):
            context = (
                f"In the year {1900 + i} the {name} number {i} was seen near the old mill by a man with {i} dogs. "
            )
            question, answer = f"When was number {i} seen?", [str(1900 + i), context.index(str(1900 + i))]
            grouped = {"context": context, "qas": [[f"{name}{i}", question, [answer]]]}
            single = {"id": i, "context": context, "question": question, "answers": [answer]}
            rows.append(json.dumps(single if name == "covid_qa" else grouped))
        file = "covid_qa/covid_qa_windows" if name == "covid_qa" else f"squadshifts/{name}"
        path = folder / f"{file}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(rows).encode()))


def prepare(job: Job) -> None:
    """The reader that all arms of a seed begin with, trained on the known domain: it stands for DistilBERT."""
    job = dataclasses.replace(job, arm=_arm("reader", job.smoke), updates=2 if job.smoke else BASE_UPDATES, lr=BASE_LR)
    model = _model(job)
    _stage(model, job, job.data["known"], job.updates)
    torch.save(model.state_dict(), job.shared / "reader.pt")


def train(job: Job) -> Outcome:
    """First all training questions, then those of the new domains alone; scores by domain."""
    model, data = _model(job), job.data
    known = torch.load(job.shared / "reader.pt", weights_only=True)
    own = job.arm.name != "reader"  # a head that reads something else begins anew
    model.load_state_dict({n: t for n, t in known.items() if not (own and n.startswith("head."))}, strict=False)
    new = data["few"] + (data["copies"] if job.arm.options.get("eda") else [])
    second = round(SECOND * job.updates)
    _stage(model, job, data["known"] + new, job.updates - second)
    if second:
        _stage(model, job, new, second)

    def scored(split: str) -> tuple[dict[int, Any], Any]:
        questions, windows = data[split]
        found = answer(model, questions, windows, data["vocabulary"], seed=job.seed)
        return scores_by_domain(questions, found.texts), found.usage.get("top")

    valid, (test, usage) = scored("valid")[0], scored("test")
    figures = {f"f1 {DOMAINS[i]}": scores.f1 for i, scores in test.items()}
    figures["F1"] = (test[1].f1 + test[2].f1) / 2
    figures["EM"] = (test[1].exact_match + test[2].exact_match) / 2
    if usage is not None:
        counted = independence(usage)
        figures |= {"chi2": counted.chi_square / counted.degrees, "V": counted.cramers_v}
        figures["-log10 p"] = -math.log10(max(counted.p, 1e-300))
    return Outcome(validation=100 - (valid[1].f1 + valid[2].f1) / 2, test=figures)


def _arm(name: str, smoke: bool) -> Arm:
    return next(arm for arm in arms(smoke) if arm.name == name)


def _model(job: Job) -> Any:
    config: Any = job.arm.model
    size = job.data["vocabulary"].size
    return config.replace(seed=job.seed, encoder=config.encoder.replace(vocab_size=size)).build()


def _stage(model: Any, job: Job, windows: list[Any], updates: int) -> None:
    batches = ExampleBatches(windows, SpanWindows(job.data["vocabulary"]), job.seed)
    job = dataclasses.replace(job, updates=updates)
    fit(model, FindSpan().build(), lambda step: batches.train(step, BATCH), job)
