"""A made-up run for the tests of the report: two models' metrics, and the trace of routers that sort characters."""

from __future__ import annotations

import argparse
import inspect

import numpy as np
import torch

from moestro.core.plan import Plan
from moestro.core.stats import Stats
from moestro.core.trail import Key, Record, Trail
from moestro.report.page import Generated, ReportData
from moestro.report.table import Line, Table
from moestro.trace import Recording
from moestro.trace.labels import CHARACTERS, PYTHON, character_labels, python_labels
from moestro.trace.record import Recorder
from moestro.trace.tables import Trace

HOSTILE = "</script></style></title><img src=x onerror=alert(1)><svg onload=alert(1)> \" ' & $\\frac{ \x00\x1b ‮ 日本"


def metrics(steps: int = 400, seed: int = 0) -> list[dict]:
    rng, rows = np.random.default_rng(seed), []
    for model, floor, speed in (("sparse", 1.92, 0.31), ("dense", 2.01, 0.26)):
        for step in range(1, steps + 1):
            bpb = floor + 3.6 / (1 + step / 14) ** 0.9 + 0.3 * np.exp(-step / 90)
            common = {"step": step, "tokens": step * 4096, "seconds": step * speed, "model": model, "lr": 1e-3}
            noisy = bpb + 0.06 * rng.standard_normal()
            row = {"split": "train", "loss": noisy * 0.693, "bpb": noisy, "tokens_per_s": 4096 / speed}
            rows.append(common | row | ({"load_entropy": 0.98} if model == "sparse" else {}))
            if step % 40 == 0:
                rows.append(common | {"split": "valid", "loss": bpb * 0.693, "bpb": bpb + 0.03})
    return rows


def routed(data: bytes, layer: int, experts: int, sharp: float, seed: int) -> Plan:
    """Top-2 of experts that like kinds of characters, more so the sharper."""
    taste = np.random.default_rng(layer).standard_normal((len(CHARACTERS), experts)) * sharp
    noise = np.random.default_rng(1000 + 7 * layer + seed).standard_normal((len(data), experts)) * 0.8
    logits = torch.from_numpy(taste[character_labels(data)] + noise).float()
    probs = logits.softmax(-1)
    expert = torch.topk(probs, 2).indices
    weight = torch.gather(probs, 1, expert)
    return Plan(expert=expert, weight=weight / weight.sum(1, keepdim=True), num_experts=experts, probs=probs)


def trace(
    steps: int = 400, layers: int = 4, experts: int = 8, silent: bool = True, names: str = "blocks.{}.ffn"
) -> Trace:
    made = Recorder(
        Recording(max_samples=6),
        labels={"character": CHARACTERS, "Python token": PYTHON},
        run={"seed": 0},
        data={"name": "standard library", "files": 612, "bytes": 11_400_000},
    )
    rng = np.random.default_rng(0)
    aim = rng.dirichlet(np.full(experts, 30.0), layers)
    start = rng.dirichlet(np.full(experts, 1.5), layers)
    for step in range(1, steps + 1):
        mix = np.exp(-step / 60)
        stats = {}
        for layer in range(layers):
            share = mix * start[layer] + (1 - mix) * aim[layer]
            if silent and layer == layers - 1 and step > steps // 3:
                share = np.where(np.arange(experts) == 3, 0.0, share)
            counts = torch.from_numpy(rng.multinomial(8192, share / share.sum()))
            nats = 4096 * (0.6 + 1.4 * np.exp(-step / (50 + 30 * layer)))
            sums = {"demand": counts, "load": counts, "units": torch.tensor(4096), "entropy_units": torch.tensor(4096)}
            stats[names.format(layer)] = Stats(sums | {"entropy": torch.tensor(nats, dtype=torch.float64)})
        made.count(step, stats)
    text = inspect.getsource(argparse).encode()[8000:12000] + "naïve — ‘test’\n".encode()
    columns = {
        "token": np.frombuffer(text, np.uint8),
        "label.character": character_labels(text),
        "label.Python token": python_labels(text),
    }
    for step in np.linspace(1, steps, 6).astype(int):
        plans = {}
        for n in range(layers):
            sharp = 2.2 * (1 - np.exp(-step / 60))
            plans[Key(names.format(n))] = Record(plan=routed(text, n, experts, sharp, 0 if step > steps // 2 else step))
        made.sample(int(step), "valid", Trail(plans), columns)
    return made.trace()


def report(**changes) -> ReportData:
    rows = metrics()
    lines = [
        Line(quantity="validation, equal steps", values=(2.1243, 2.2143), unit="bits per byte", better="lower"),
        Line(quantity="parameters", values=(4_230_144, 1_420_288), digits=None),
        Line(quantity="speed", values=(13213, 15754), unit="training tokens / s", better="higher", digits=0),
        Line(quantity="load entropy", values=(0.98, None), unit="1 = equal loads", digits=3),
    ]
    values = dict(
        title="nano: a sparse decoder on Python's standard library",
        lead="4 layers, width 128, 8 experts of width 256, top-2, 400 steps of 4096 bytes, seed 0. Trained on 2 cores.",
        metrics=rows,
        trace=trace(),
        comparison=Table(title="both", models=("sparse", "dense"), lines=tuple(lines), notes=("after step 400",)),
        config={"model": {"dim": 128, "layers": [{"experts": 8}, {"experts": 8}]}, "lr": 0.001, "seed": 0},
        environment={"python": "3.11.2", "torch": "2.13.0", "cpu": "2 cores", "moestro": "0.1.0"},
        samples=[
            Generated(model="sparse", prompt="def main(", text="args):\n    for name in args:\n        print(name)\n")
        ],
        command="moestro train nano --seed 0",
    )
    return ReportData(**(values | changes))
