"""Data and training of the comparison of 41 SMoE-Dropout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from ...core.signals import Signals
from ...tasks.config import NextToken
from ...tasks.data.config import ByteVocabulary, Gutenberg, TinyShakespeare
from ...tasks.data.examples import Passage
from ...tasks.data.streams import DomainBatches
from ...tasks.scoring import domain_bits
from ...trace.diversity import diversity_of_model
from ..fit import fit
from ..paper import Job, Outcome
from ..smoe_dropout import FEW, RAMP, SHOWN, B, S


def load(folder: Path) -> dict[bool, Any]:
    """few -> batches: books of seven domains, or the beginning of one text."""
    books = Gutenberg(folder=str(folder / Gutenberg.slug), validation=0.05, test=0.05).build()
    text = TinyShakespeare(folder=str(folder / TinyShakespeare.slug)).build()
    few = dataclasses.replace(text, train=(Passage(text.train[0].text[:FEW]),))
    bytes_ = ByteVocabulary().build(())
    return {False: DomainBatches(books, bytes_, S), True: DomainBatches(few, bytes_, S)}


def sample(folder: Path) -> None:
    for name in ("gutenberg_domains/fiction_one.txt", "gutenberg_domains/law_two.txt", "tiny_shakespeare/input.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name}: to be, or not to be, that is the question.\n" * 120, encoding="utf-8")


def train(job: Job) -> Outcome:
    few = bool(job.arm.options.get("few"))
    data, size, windows = job.data[few], 2 if job.smoke else B, 2 if job.smoke else 64 if few else 16
    config: Any = job.arm.model
    model = config.replace(seed=job.seed).build()
    knobs = (RAMP,) if "grows" in job.arm.options else ()
    fit(model, NextToken().build(), lambda t: data.train(t + 100_000 * job.seed, size), job, knobs=knobs)

    def bits(split: str, **knobs: int) -> float:
        return mean(domain_bits(model, data, split, windows, Signals(knobs=knobs)).values())

    figures = {"bits": bits("test")}
    if config.moe is not None:
        figures |= {f"K {k}": bits("test", top_k=k) for k in SHOWN}
        figures["redundancy"] = mean(found.cosine for found in diversity_of_model(model).values())
    curve = [(float(k), figures.get(f"K {k}", figures["bits"])) for k in SHOWN]
    return Outcome(validation=bits("valid"), test=figures, curves={} if few else {"slimmed": curve})
