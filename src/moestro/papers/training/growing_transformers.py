"""Data, training and evaluation of the comparison 45, Growing Transformers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ...adapt.growth import growing, stage_costs
from ...adapt.growth_config import GrowthSchedule
from ...core.errors import UserError
from ...models.config import Decoder
from ...models.ensemble import ensemble
from ...nn.config import Attention, LayerNorm, PlainFeedForward
from ...tasks.config import NextToken
from ...tasks.data.config import ByteVocabulary, ChinesePoetry, Domains, Gutenberg, Mmlu, RussianPlays
from ...tasks.data.streams import DomainBatches
from ...tasks.language import mean_nats
from ...train.memory import step_memory
from ..fit import fit
from ..growing_transformers import BASE, CODE, DOMAINS, GROWN, LESS, TEXTS, B, S
from ..paper import Counted, Job, Outcome

THEIRS = Decoder(
    vocab_size=65_536,
    dim=1024,
    num_layers=9,
    attention=Attention(num_heads=32, num_kv_heads=32, head_dim=32),
    ffn=PlainFeedForward(width=4096, bias=True),
    norm=LayerNorm(),
    head_bias=True,
    embedding=CODE,
    context=1024,
)


def load(folder: Path) -> dict[str, Any]:
    """English books, Russian plays, Chinese poems and English questions, as bytes; batches of every mixture."""
    kinds = Gutenberg, RussianPlays, ChinesePoetry, Mmlu
    text = Domains(parts=tuple(kind(folder=str(folder / kind.slug)) for kind in kinds)).build()
    words = ByteVocabulary().build()
    return {name: DomainBatches(text, words, S, shares=shares) for name, shares in TEXTS.items()}


def sample(folder: Path) -> None:
    said = {
        "gutenberg_domains/fiction_a.txt": "It was the best of times, it was the worst of times.\n",
        "rusdracor_plays/ru.txt": "Быть или не быть, вот в чём вопрос.\n",
        "chinese_poetry/zh.txt": "床前明月光，疑是地上霜。\n",
        "mmlu_arc/mmlu_test.jsonl": "",
    }
    rows = [
        {"subject": "sums", "question": f"{i} + 1?", "choices": [str(i), str(i + 1)], "answer": "B"} for i in range(99)
    ]
    for name, line in said.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(line * 60 or "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def taught(model: Any, job: Job, text: str, updates: int, first: int = 0) -> Any:
    """The model, trained; other seeds read the same text in another order."""
    start = first + 100_000 * job.seed
    tick = job.tick if job.arm.passes == 1 else lambda n: None  # two trainings, or two steps, per update
    job = dataclasses.replace(job, updates=updates, tick=tick)
    fit(model, NextToken().build(), lambda step: job.data[text].train(start + step, B if text == "en" else LESS), job)
    return model


def nats(model: Any, job: Job, domain: str, split: str) -> float:
    windows = job.data["all"].held_out(DOMAINS.index(domain), 64, split, 4 if job.smoke else 192)
    return mean_nats(model, windows)


def languages(model: Any, job: Job, known: tuple[str, ...] = ("en", "ru", "zh")) -> Outcome:
    test = {domain: nats(model, job, domain, "test") for domain in DOMAINS}
    test["mixed"] = (test["en"] + test["ru"] + test["zh"]) / 3
    return Outcome(validation=sum(nats(model, job, d, "valid") for d in known) / len(known), test=test)


def fresh(job: Job, number: int = 0) -> Any:
    assert job.arm.model is not None
    return job.arm.model.replace(seed=2 * job.seed + number).build()


def stored(job: Job, text: str) -> Path:
    return job.shared / f"{text}-{job.updates}.safetensors"


def specialist(job: Job) -> Outcome:
    """A model of English and one other language, kept for those that are made of two."""
    text = job.arm.options["text"]
    model = taught(fresh(job, int(text == "zh")), job, text, job.updates)
    job.shared.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), stored(job, text))
    return languages(model, job, ("en", text))


def composed(job: Job) -> Outcome:
    """The two specialists' outputs averaged; nothing is trained, but where their embeddings are not the same."""
    models = [fresh(job, i) for i in (0, 1)]
    for model, text in zip(models, ("ru", "zh")):
        if job.arm.options["trains"]:
            taught(model, job, text, job.updates)
        elif stored(job, text).is_file():
            model.load_state_dict(load_file(stored(job, text)))
        else:
            raise UserError(f"{stored(job, text)} is gone; remove the record and begin again")
    made = languages(ensemble(models, job.arm.options["space"]), job)
    return dataclasses.replace(made, test={**made.test, "single": min(languages(m, job).test["mixed"] for m in models)})


def joint(job: Job) -> Outcome:
    """One model on both languages, with as many updates as both specialists together."""
    return languages(taught(fresh(job), job, "all", 2 * job.updates), job)


def grown(job: Job) -> Outcome:
    """A model on the English books, stage by stage; with one stage, all of it at once."""
    schedule = GrowthSchedule.from_dict(job.arm.options["schedule"])
    assert isinstance(job.arm.model, Decoder)
    steps, seen, trained, held = schedule.updates(job.updates), [], [], []
    batch, memory, model = job.data["en"].train(0, B), None, None
    for stage in growing(schedule, job.arm.model.replace(seed=job.seed)):
        model = stage.model
        taught(model, job, "en", steps[stage.number], first=sum(steps[: stage.number]))
        seen.append(nats(model, job, "en", "valid"))
        memory = step_memory(model, lambda m: m.loss(batch.tokens, batch.targets)[0])
        trained.append(memory.trained)
        held.append(memory.gradients + memory.optimizer)
    assert memory is not None
    test = {"book": nats(model, job, "en", "test"), "trained": float(max(trained)), "state": float(max(held))}
    test |= {"activations": float(memory.activations)}
    if len(seen) > 1:
        test |= {"fall": min(1 - b / a for a, b in itertools.pairwise(seen)), "least trained": float(min(trained))}
    return Outcome(validation=seen[-1], test=test)


@functools.cache
def part_of_all() -> float:
    """(head, norm and 2 blocks) / (all parameters, the embedding too), counted."""
    deep = BASE.replace(num_layers=6)
    return stage_costs(GROWN, deep)[-1].trained / deep.replace(embedding=None).num_params()


@functools.cache
def counted() -> list[Counted]:
    stage, whole = stage_costs(GrowthSchedule(), THEIRS)[-1], THEIRS.replace(embedding=None).num_params()
    frozen = THEIRS.num_params()
    rows = (
        ("trained in a stage: 3 blocks and head", stage.trained / 1e6, 105.0, "million"),
        ("9 blocks without the embedding", frozen / 1e6, 180.5, "million"),
        ("9 blocks with a trained embedding", whole / 1e6, 247.6, "million"),
        ("9 blocks with the stored 16-bit code", (frozen + 65_536 * 16) / 1e6, 181.6, "million"),
        ("gradients and AdamW state, of a stage", 12 * stage.trained / 1e9, None, "GB"),
        ("gradients and AdamW state, all at once", 12 * whole / 1e9, None, "GB"),
        ("share of the blocks that keep activations, last stage", stage.activation_share, None, ""),
    )
    return [Counted(what=what, ours=ours, published=theirs, unit=unit) for what, ours, theirs, unit in rows]
