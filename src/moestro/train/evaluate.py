"""Evaluation: the loss on a fixed set of held-out windows, and how the model routes them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.plan import AnyPlan
from ..core.signals import Signals
from ..core.trail import Trail
from ..tasks.batches import Batch, Batches
from ..trace.metrics import load_entropy, max_violation
from .config import TrainRun
from .knobs import knobs_at
from .ranks import Ranks
from .step import autocast, signals_of

__all__ = ["Evaluation", "Sampled", "evaluate"]

TOKENS = 8192  # tokens of one forward pass; no more than max(1, this // seq_len) sequences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """The first windows of this rank with their routing, probabilities included. starts: [B] places in the text."""

    batch: Batch
    starts: np.ndarray
    trail: Trail


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """nats: mean per token. bits_per_byte: of text. tokens: how many. layers: path -> readings of its load.

    load_entropy, routing_entropy: means over layers, None without routed layers.
    """

    nats: float
    bits_per_byte: float
    tokens: int
    layers: dict[str, dict[str, Any]]
    load_entropy: float | None
    routing_entropy: float | None
    sampled: Sampled


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Any,
    batches: Batches,
    config: TrainRun,
    ranks: Ranks,
    step: int = 0,
    watch: Callable[[int, int], None] | None = None,
    knobs: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Evaluate in evaluation mode: no parameter, router state or training count changes.

    Ranks take turns over the windows (rank, rank + world, ...), and their sums are added.
    watch: called with (windows done, windows in all) of this rank. knobs: call-time values, before the last ones of the
    run's schedules.
    """
    training = model.training
    model.eval()
    last = {**knobs_at(config.knobs, config.steps, config.steps), **(knobs or {})}
    signals = dataclasses.replace(signals_of(config, step), progress=1.0, keep=frozenset({"probs"}), knobs=last)
    windows = batches.valid_windows(config.eval_windows)
    if len(windows) < ranks.world:
        raise UserError(
            f"the validation text gives only {len(windows)} windows of {config.seq_len} tokens for {ranks.world} "
            "ranks; use more text, a smaller seq_len or fewer ranks"
        )
    starts = windows[ranks.rank :: ranks.world]
    nats = torch.zeros((), dtype=torch.float64, device=ranks.device)
    tokens, text_bytes = 0, 0.0
    routing: dict[str, Tensor] = {}
    sampled: Sampled | None = None
    for first, part in _chunks(starts, max(1, TOKENS // config.seq_len)):
        batch = batches.valid(part, first)
        outcome = _forward(model, objective, batch.to(ranks.device), signals, ranks)
        nats += outcome.loss
        tokens += objective.count(batch)
        text_bytes += batch.text_bytes
        for key, record in outcome.trail.items():
            if record.load is not None:
                made = torch.cat([record.load.double(), _entropy(record.plan, ranks.device)])
                routing[key.path] = routing[key.path] + made if key.path in routing else made
        if sampled is None:
            sampled = Sampled(batch=batch, starts=part, trail=outcome.trail)
        if watch is not None:
            watch(first + len(part), len(starts))
    model.train(training)
    said = torch.tensor([tokens, text_bytes], dtype=torch.float64, device=ranks.device)
    nats, said, *rest = ranks.add([nats, said, *(routing[path] for path in sorted(routing))])
    count, text_bytes = said.tolist()
    layers = {path: _reading(values) for path, values in zip(sorted(routing), rest)}
    assert sampled is not None
    return Evaluation(
        nats=float(nats) / count,
        bits_per_byte=float(nats) / math.log(2) / text_bytes,
        tokens=int(count),
        layers=layers,
        load_entropy=_mean(layers, "load_entropy"),
        routing_entropy=_mean(layers, "routing_entropy"),
        sampled=sampled,
    )


def _forward(model: nn.Module, objective: Any, batch: Batch, signals: Signals, ranks: Ranks) -> Any:
    with autocast(ranks.device):
        return objective(model, batch, signals)


def _chunks(starts: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    for first in range(0, len(starts), size):
        yield first, starts[first : first + size]


def _entropy(plan: AnyPlan | None, device: torch.device) -> Tensor:
    """[2] float64: sum of the routing entropies of valid units in nats, and number of those units; zeros if unknown."""
    if plan is None or plan.probs is None:
        return torch.zeros(2, dtype=torch.float64, device=device)
    probs = plan.probs.double()
    probs = probs / probs.sum(-1, keepdim=True).clamp_min(1e-300)
    each = -torch.special.xlogy(probs, probs).sum(-1)
    valid = torch.ones_like(each) if plan.valid is None else plan.valid.double()
    return torch.stack([(each * valid).sum(), valid.sum()])


def _reading(values: Tensor) -> dict[str, Any]:
    *load, entropy, units = values.tolist()
    counts = np.asarray(load)
    return {
        "load": [int(n) for n in load],
        "load_entropy": _finite(load_entropy(counts)),
        "max_violation": _finite(max_violation(counts)),
        "routing_entropy": entropy / units if units else None,
    }


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mean(layers: dict[str, dict[str, Any]], name: str) -> float | None:
    known = [layer[name] for layer in layers.values() if layer[name] is not None]
    return math.fsum(known) / len(known) if known else None
