"""Data, training and evaluation of the comparison 03 Similarity- and attention-aware routing."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from ...tasks.config import Classify, NextToken
from ...tasks.data.augment import corrupted
from ...tasks.data.batches import ExampleBatches
from ...tasks.data.collate import LabelTexts
from ...tasks.data.config import Banking77, ByteVocabulary, TinyShakespeare, WordVocabulary
from ...tasks.data.streams import DomainBatches
from ...tasks.routing_probe import RoutingProbe
from ...tasks.scoring import domain_bits, share_right
from ..fit import fit
from ..paper import Job, Outcome
from ..similarity_attention_aware_smoe import LATE


def load(folder: Path) -> dict[str, Any]:
    found = Banking77(folder=str(folder / Banking77.slug)).build()
    texts = LabelTexts(WordVocabulary(size=2500).build([row.text for row in found.train]), 32)
    splits: dict[str, Any] = {name: getattr(found, name) for name in ("train", "valid", "test")}
    splits["corrupted"] = [row._replace(text=corrupted(row.text, 0.2, seed)) for seed in (0, 1) for row in found.test]
    text = TinyShakespeare(folder=str(folder / TinyShakespeare.slug)).build()
    return {name: ExampleBatches(rows, texts) for name, rows in splits.items()} | {
        "text": DomainBatches(text, ByteVocabulary().build(()), 64)
    }


def sample(folder: Path) -> None:
    (folder / "intents").mkdir()
    rows = [
        {"split": s, "text": f"why is my card {i} lost", "label": str(i % 3)}
        for s in ("train", "test")
        for i in range(40)
    ]
    (folder / "intents" / "banking77.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "tiny_shakespeare").mkdir()
    (folder / "tiny_shakespeare" / "input.txt").write_text("to be, or not to be\n" * 200, encoding="utf-8")


def train(job: Job) -> Outcome:
    text, few = "text" in job.arm.options, job.smoke
    data, size = job.data["text" if text else "train"], 4 if few else 16 if text else 64
    config: Any = job.arm.model
    model = config.replace(seed=job.seed).build()
    objective = (NextToken() if text else Classify()).build()
    held = job.data["text"].held_out(0, 16)[0] if text else next(job.data["valid"].each(128))[1]
    probe, late = RoutingProbe(model, objective, held), {round(share * job.updates) for share in LATE}

    def watch(step: int, outcome: Any) -> None:
        if step in late:
            probe.look()

    fit(model, objective, lambda step: data.train(step + 100_000 * job.seed, size), job, watch=watch)
    sure = probe.look().values()
    figures = {
        "fluctuation": probe.fluctuation(),
        "entropy": mean(c.mean for c in sure),
        "entropy before": mean(c.unmixed_mean for c in sure),
        "highest": max(c.highest for c in sure),
        "highest before": max(c.unmixed_highest for c in sure),
    }
    if text:
        valid, test = (mean(domain_bits(model, data, s, 4 if few else 128).values()) for s in ("valid", "test"))
        return Outcome(validation=valid, test=figures | {"bits": test})
    right = {s: 100 * share_right(model, objective, job.data[s]) for s in ("valid", "test", "corrupted")}
    return Outcome(
        validation=100 - right["valid"],
        test=figures | {"accuracy": right["test"], "corrupted": right["corrupted"]},
    )
