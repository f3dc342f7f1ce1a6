"""Evaluation: the loss on a fixed set of held-out sequences, and how the model routes them."""

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
from ..tasks.batches import Feed
from ..trace.metrics import load_entropy, max_violation
from .config import TrainRun
from .knobs import knobs_at
from .ranks import Ranks
from .step import autocast, signals_of

__all__ = ["Evaluation", "Sampled", "bits_per_byte", "evaluate"]

TOKENS = 8192  # tokens of one forward pass; no more than max(1, this // seq_len) sequences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """The first sequences of this rank with their routing, probabilities included. starts: [B] places or numbers."""

    batch: Any
    starts: np.ndarray
    trail: Trail


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """nats: mean per target, without label smoothing. tokens: how many. targets, text_bytes: how many were told, and
    the bytes that they stand for (0 where they are no text). metrics: the objective's, summed over targets. layers:
    path -> readings of its load. load_entropy, routing_entropy: means over layers, None without routed layers.
    """

    nats: float
    tokens: int
    targets: int
    text_bytes: float
    metrics: dict[str, float]
    layers: dict[str, dict[str, Any]]
    load_entropy: float | None
    routing_entropy: float | None
    sampled: Sampled

    @property
    def bits_per_byte(self) -> float:
        """Of text; nan where targets are no text."""
        return bits_per_byte(self.nats, self.targets, self.text_bytes) if self.text_bytes else math.nan

    @property
    def score(self) -> float:
        """Bits per byte of text; where targets are no text, nats per target."""
        return self.bits_per_byte if self.text_bytes else self.nats


def bits_per_byte(nats: float, targets: int, text_bytes: float) -> float:
    """nats: mean per target."""
    return nats / math.log(2) * targets / text_bytes


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Any,
    batches: Feed,
    config: TrainRun,
    ranks: Ranks,
    step: int = 0,
    watch: Callable[[int, int], None] | None = None,
    knobs: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Evaluate in evaluation mode: no parameter, router state or training count changes.

    Ranks take turns over the sequences (rank, rank + world, ...), and their sums are added. What an objective compares
    with each other (the pairs of a group) stays in one batch; sequences that fill no group are left out.
    watch: called with (sequences done, sequences in all) of this rank. knobs: call-time values, before the last ones of
    the run's schedules.
    """
    training = model.training
    model.eval()
    last = {**knobs_at(config.knobs, config.steps, config.steps), **(knobs or {})}
    signals = dataclasses.replace(signals_of(config, step), progress=1.0, keep=frozenset({"probs"}), knobs=last)
    windows = batches.valid_windows(config.eval_windows)
    if len(windows) < ranks.world:
        raise UserError(
            f"only {len(windows)} sequences of {config.seq_len} tokens are held out for {ranks.world} ranks; give more "
            "data, a smaller seq_len or fewer ranks"
        )
    starts, size = _grouped(windows[ranks.rank :: ranks.world], objective, config, ranks)
    nats = torch.zeros((), dtype=torch.float64, device=ranks.device)
    tokens, targets, text_bytes = 0, 0, 0.0
    metrics: dict[str, Tensor] = {}
    routing: dict[str, Tensor] = {}
    sampled: Sampled | None = None
    for first, part in _chunks(starts, size):
        batch = batches.valid(part, first)
        outcome = _forward(model, objective, batch.to(ranks.device), signals, ranks)
        nats += outcome.loss
        targets += objective.count(batch)
        tokens += batch.num_tokens
        text_bytes += getattr(batch, "text_bytes", 0.0)
        for name, value in outcome.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value.double()
        for key, record in outcome.trail.items():
            if record.load is not None:
                made = torch.cat([record.load.double(), _entropy(record.plan, ranks.device)])
                routing[key.path] = routing[key.path] + made if key.path in routing else made
        if sampled is None:
            sampled = Sampled(batch=batch, starts=part, trail=outcome.trail)
        if watch is not None:
            watch(first + len(part), len(starts))
    model.train(training)
    said = torch.tensor([tokens, targets, text_bytes], dtype=torch.float64, device=ranks.device)
    nats, said, *rest = ranks.add([nats, said, *metrics.values(), *(routing[path] for path in sorted(routing))])
    tokens, targets, text_bytes = said.tolist()
    sums = {name: float(value) for name, value in zip(metrics, rest)}
    layers = {path: _reading(values) for path, values in zip(sorted(routing), rest[len(metrics) :])}
    assert sampled is not None
    return Evaluation(
        nats=sums.get("nats", float(nats)) / targets if targets else math.nan,
        tokens=int(tokens),
        targets=int(targets),
        text_bytes=text_bytes,
        metrics={name: value for name, value in sums.items() if name != "nats"},
        layers=layers,
        load_entropy=_mean(layers, "load_entropy"),
        routing_entropy=_mean(layers, "routing_entropy"),
        sampled=sampled,
    )


def _grouped(starts: np.ndarray, objective: Any, config: TrainRun, ranks: Ranks) -> tuple[np.ndarray, int]:
    """The sequences of this rank and how many to pass at once: a multiple of what the objective compares.

    `objective.together` says how many those are; 0 = all of a micro-batch, as in training.
    """
    size = max(1, TOKENS // config.seq_len)
    group = getattr(objective, "together", 1) or config.micro_batch or max(1, config.batch_size // ranks.world)
    if group == 1:
        return starts, size
    return starts[: len(starts) // group * group] if len(starts) >= group else starts, max(group, size // group * group)


def _forward(model: nn.Module, objective: Any, batch: Any, signals: Signals, ranks: Ranks) -> Any:
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
