"""Data, training and evaluation of the comparison 34, contrastive embeddings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ...convert.config import Copy
from ...losses.config import MNRPlus, PairLoss
from ...optim.config import AdamW, Cosine
from ...tasks.data.batches import ExampleBatches
from ...tasks.data.collate import PairedTexts
from ...tasks.data.config import Banking77, CoCitation, Gsm8k, Multi30k, PairDomains, WordVocabulary
from ...tasks.matching import GroupedPairs, match
from ...tasks.objectives import MatchPairs
from ..contrastive_moe_embeddings import (
    AWAY,
    BASE_LR,
    BASE_UPDATES,
    CHOICE,
    DOMAINS,
    GROUP,
    HELD_OUT,
    LENGTH,
    TRAIN,
    VOCABULARY,
    arms,
)
from ..fit import fit
from ..paper import Job, Outcome


def data(folder: Path) -> dict[str, Any]:
    """Pairs of every split, a list for each domain; collates without and with the token of a domain in front."""
    sets = (Banking77(), Multi30k(), Multi30k(target_language="fr"), Gsm8k(notes=False), CoCitation())
    parts = tuple(part.replace(folder=str(folder / part.slug)) for part in sets)
    found = PairDomains(parts=parts, train=TRAIN, held_out=HELD_OUT).build()
    splits = {split: [[] for _ in sets] for split in ("train", "valid", "test")}
    for split, domains in splits.items():
        for pair in getattr(found, split):
            a, b = (" ".join(text.split()[:LENGTH]) for text in (pair.a, pair.b))
            domains[pair.domain].append(pair._replace(a=a, b=b))
    names = [f"<domain {i}>" for i in range(DOMAINS)]
    texts = (text for pairs in splits["train"] for pair in pairs for text in (pair.a, pair.b))
    vocabulary = WordVocabulary(size=VOCABULARY).build(texts, names)
    collates = [PairedTexts(vocabulary, LENGTH, tokens, swap=True) for tokens in ((), names)]
    return splits | {"vocabulary": vocabulary, "collates": collates}


def sample(folder: Path) -> None:
    def lines(name: str, rows: list[Any]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")

    count = range(60)
    lines("intents/banking77.jsonl", [
        {"split": s, "text": f"question {i} about card {i % 2} {s}", "label": f"card {i % 2}"}
        for s in ("train", "test") for i in count
    ])  # fmt: skip
    for split in ("train", "val", "test_2016_flickr"):
        for language in ("en", "de", "fr"):
            lines(f"multi30k/{split}.{language}", [f"{language} sentence {i} of {split}" for i in count])
    for split in ("train", "test"):
        rows = [{"question": f"{i} and {i} in {split}?", "answer": f"{i}+{i}\n#### {2 * i}"} for i in count]
        lines(f"gsm8k/{split}.jsonl", rows)
    papers = [{"id": f"P{i}", "title": f"Paper {i}", "abstract": f"On topic {i % 2}.", "community": 0} for i in count]
    lines("acl_cocitation/papers.jsonl", papers)
    cited = [f"P{i},P{j},1" for i in count for j in count if i < j and (i + j) % 9 == 0]
    lines("acl_cocitation/cocitation_pairs.csv", ["a,b,n", *cited])


def prepare(job: Job) -> None:
    """The dense model that all arms begin with, trained on all domains; domain tokens begin as copies of [cls]."""
    model, vocabulary = dense_model(job), job.data["vocabulary"]
    updates = job.updates if job.smoke else BASE_UPDATES
    learn(model, dataclasses.replace(job, lr=BASE_LR, updates=updates), range(DOMAINS), MNRPlus(), tokens=False)
    table = model.encoder.embed.weight.data
    table[job.data["collates"][1].first] = table[vocabulary.cls].clone()
    save_file(model.state_dict(), job.shared / "dense.safetensors")


def dense_model(job: Job, load: bool = False) -> Any:
    """The dense model, new or as `prepare` left it."""
    config: Any = next(arm for arm in arms(job.smoke) if arm.name == "dense").model
    encoder = config.encoder.replace(vocab_size=job.data["vocabulary"].size)
    model = config.replace(encoder=encoder, seed=job.seed).build()
    if load:
        model.load_state_dict(load_file(job.shared / "dense.safetensors"))
    return model


def parts(job: Job, split: str, domains: Any, tokens: bool, most: int = HELD_OUT) -> list[Any]:
    """The examples of each of these domains; of held-out ones at most so many related and as many others."""
    found = []
    for domain in domains:
        pairs = job.data[split][domain]
        if split != "train":
            pairs = [p for kind in (True, False) for p in [p for p in pairs if p.similar is kind][:most]]
        found.append(ExampleBatches(pairs, job.data["collates"][tokens], job.seed))
    return found


def learn(model: Any, job: Job, domains: Any, loss: Any, tokens: bool) -> None:
    """Every batch holds as many groups of pairs as there are domains in all."""
    batches = GroupedPairs(parts(job, "train", domains, tokens), GROUP)
    objective = MatchPairs(loss=loss, group=GROUP).build()
    optimizer = AdamW(schedule=Cosine(warmup=0.1))
    fit(model, objective, lambda step: batches.train(step, GROUP * DOMAINS), job, optimizer=optimizer)


def measure(model: Any, job: Job, split: str, tokens: bool, domains: Any = range(DOMAINS), most: int = HELD_OUT) -> Any:
    """What `match` says of each domain."""
    held = parts(job, split, domains, tokens, most)
    return [match(model, (batch for _, batch in part.each(250))) for part in held]


def outcome(valid: list[Any], test: list[Any], **more: float) -> Outcome:
    def mean(values: list[float]) -> float:
        return 100 * sum(values) / len(values)

    f1 = {f"f1-{i}": 100 * found.best.f1 for i, found in enumerate(test)}
    more |= {"f1": mean([t.best.f1 for t in test]), "gap": mean([t.cosines.related - t.cosines.others for t in test])}
    return Outcome(validation=-mean([v.best.f1 for v in valid]), test=f1 | more)


def train(job: Job) -> Outcome:
    tokens, more = job.arm.options["tokens"], {}
    model = dense_model(job, load=True)
    kinds = job.arm.model.encoder.kinds()  # type: ignore[union-attr]
    if "moe" in kinds:
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "moe")
        model, receipt = Copy(num_experts=DOMAINS, top_k=1, router="label", layers=layers).build(model)
        more["apart"] = receipt.measured.relative
    else:
        start = measure(model, job, "test", tokens=False)
        more["start"] = 100 * sum(found.best.f1 for found in start) / DOMAINS
    learn(model, job, range(DOMAINS), PairLoss.from_dict(job.arm.options["loss"]), tokens)
    return outcome(measure(model, job, "valid", tokens, most=CHOICE), measure(model, job, "test", tokens), **more)


def train_single(job: Job) -> Outcome:
    """A dense model for each domain, and how it does on the other domains."""
    valid: list[Any] = []
    test: list[Any] = []
    away: list[float] = []
    each = dataclasses.replace(job, updates=max(1, round(job.updates / DOMAINS)))
    for domain in range(DOMAINS):
        model = dense_model(job, load=True)
        learn(model, each, [domain], PairLoss.from_dict(job.arm.options["loss"]), tokens=False)
        valid += measure(model, job, "valid", False, [domain], CHOICE)
        test += measure(model, job, "test", False, [domain])
        others = [i for i in range(DOMAINS) if i != domain]
        away += [found.best.f1 for found in measure(model, job, "test", False, others, AWAY)]
    return outcome(valid, test, **{"f1-away": 100 * sum(away) / len(away)})
