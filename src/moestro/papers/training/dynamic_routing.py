"""Data and training of the comparison of 21 Dynamic routing."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ...core.signals import Signals
from ...routers.config import TopP
from ...tasks.config import NextToken
from ...tasks.data.config import Bbh, ByteVocabulary, Domains, Gsm8k, Gutenberg
from ...tasks.data.streams import DomainBatches
from ...trace.spending import quantile_labels, spent
from ..dynamic_routing import DOMAINS, SWEEP, B, S
from ..fit import fit
from ..paper import Job, Outcome


def load(folder: Path) -> Any:
    parts = Gutenberg, Gsm8k, Bbh
    data = Domains(parts=tuple(part(folder=str(folder / part.slug)) for part in parts)).build()
    assert data.domains == DOMAINS
    return DomainBatches(data, ByteVocabulary().build(()), S, shares=(1.0,) * len(DOMAINS))


def sample(folder: Path) -> None:
    for slug in DOMAINS:
        (folder / slug).mkdir()
    (folder / "gutenberg_domains" / "fiction_a.txt").write_text("It was the best of times, it was the worst. " * 90)
    row = json.dumps({"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}) + "\n"
    for split in ("train", "test"):
        (folder / "gsm8k" / f"{split}.jsonl").write_text(
            "".join(row.replace("2", str(n)) for n in range(80 if split == "train" else 12))
        )
    rows = [{"task": "boolean", "input": f"not ( True ) and {n} is", "target": "False"} for n in range(150)]
    (folder / "bbh" / "bbh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(job: Job) -> Outcome:
    model: Any = job.arm.model
    model = model.replace(seed=job.seed).build()
    batches, size = job.data, 4 if job.smoke else B
    taken: list[float] = []

    def watch(step: int, outcome: Any) -> None:
        counts = outcome.trail.counts().values()
        taken.append(sum(int(c.sum()) for c in counts) / (len(counts) * size * S))

    fit(model, NextToken().build(), lambda step: batches.train(10_000 * job.seed + step, size), job, watch=watch)
    bits, found = (measured(model, batches, split, job.smoke) for split in ("valid", "test"))
    first, every = (max(1, len(taken) // n) for n in (20, 50))
    found |= {"experts_start": sum(taken[:first]) / first, "experts_train": sum(taken) / len(taken)}
    means = [(float(i + every), sum(taken[i : i + every]) / every) for i in range(0, len(taken) - every + 1, every)]
    curves = {"experts": means}
    if isinstance(model.config.moe.router.select, TopP):
        swept = [(p, measured(model, batches, "test", job.smoke, p)) for p in SWEEP]
        curves |= {f"{name} by p": [(p, f[name]) for p, f in swept] for name in ("experts", "bits")}
        found["sweep"] = min(b["experts"] - a["experts"] for (_, a), (_, b) in itertools.pairwise(swept))
    return Outcome(validation=bits["bits"], test=found, curves=curves)


def measured(model: Any, batches: Any, split: str, smoke: bool, p: float | None = None) -> dict[str, float]:
    """Bits per byte and experts per token and layer of held-out windows, as many of each domain."""
    made = [b for d in range(len(DOMAINS)) for b in batches.held_out(d, 1, split, 2 if smoke else 40)]
    tokens, targets, domain = (torch.cat([getattr(b, n) for b in made]) for n in ("tokens", "targets", "domain"))
    each = domain[:, None].expand(tokens.shape).reshape(-1)
    with torch.no_grad():
        logits, _, trail = model.eval()(tokens, Signals(knobs={} if p is None else {"top_p": p}))
        bits = F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1), reduction="none") / math.log(2)
    all_, by = spent(trail, each), spent(trail, quantile_labels(bits)).by
    assert all_.by is not None
    assert by is not None
    found = {"bits": float(bits.mean()), "experts": all_.mean, "experts_easy": by[0], "experts_hard": by[-1]}
    for d, name in enumerate(DOMAINS):
        found |= {f"bits_{name}": float(bits[each == d].mean()), f"experts_{name}": all_.by[d]}
    first, *_, last = all_.layers.values() if len(all_.layers) > 1 else 2 * (all_.mean,)
    found |= {"experts_first": first, "experts_last": last}
    return {name: float(value) for name, value in found.items()}
