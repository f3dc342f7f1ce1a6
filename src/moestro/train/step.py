"""The gradient of one optimiser step, exact over ranks and micro-batches.

The loss of a global batch is
    sum of nats / number of targets + sum over loss terms of coefficient * value(statistics of the whole batch).
Every part (rank, micro-batch) evaluates the terms at the pooled statistics and keeps its own gradient
(`Stats.within`), so the gradients of all parts add up to the gradient of that number. The pooled statistics must be
known before the first backward pass: ranks add theirs; of several micro-batches all but the first run forward once
more, before, without gradient. With `balance_over="micro_batch"` each part uses its own statistics instead, and the
values are averaged by number of targets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.draws import fold
from ..core.errors import UserError
from ..core.plan import Plan, num_units
from ..core.signals import Signals
from ..core.stats import Stats
from ..core.trail import Key, Record, TermKey, Trail, add_stats
from ..optim.touched import settle
from ..tasks.batches import Feed
from .config import TrainRun
from .knobs import knobs_at
from .ranks import Ranks
from .stop import Stop
from .terms import Reach, declared, pool, total

__all__ = ["Gradient", "Gradients", "autocast", "signals_of"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient:
    """What one step's forward and backward passes gave, over the whole global batch; gradients lie in the parameters.

    nats: mean over targets. loss: nats and weighted terms. tokens: of all sequences. text_bytes: that targets stand
    for, 0 where they are no text. metrics: the objective's, summed. terms: values, as they joined the loss. counts:
    layer path -> [E] int64 demand over passes, micro-batches and ranks. routing: the trail of the whole batch, with
    counts and pooled statistics and, in place of plans, ones that say only how many units there were. stop: whether any
    rank was asked to stop.
    """

    loss: float
    nats: float
    targets: int
    tokens: int
    text_bytes: float
    metrics: dict[str, float]
    terms: dict[TermKey, float]
    counts: dict[str, Tensor]
    routing: Trail
    stop: bool


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 matrix products on GPUs, nothing on CPUs."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def signals_of(config: TrainRun, step: int) -> Signals:
    """The signals common to all tokens of a step: its seed, how far training is, and the knobs' values."""
    seed = fold(fold(fold(config.seed, "draws"), step), 0)
    return Signals(seed=seed, progress=step / config.steps, knobs=knobs_at(config.knobs, step, config.steps))


@dataclasses.dataclass
class _Sums:
    """What adds up over the micro-batches of this rank."""

    nats: Tensor
    tokens: int = 0
    text_bytes: float = 0.0
    metrics: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    terms: dict[TermKey, Tensor] = dataclasses.field(default_factory=dict)
    counts: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    load: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    units: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    last: Trail = dataclasses.field(default_factory=Trail)

    def note(self, trail: Trail) -> None:
        """Counts of one training pass."""
        self.last = trail
        for key, record in trail.items():
            for into, counts in ((self.counts, record.demand), (self.load, record.load), (self.units, _units(record))):
                if counts is not None:
                    into[key.path] = into[key.path] + counts if key.path in into else counts


class Gradients:
    """Runs steps up to their gradients, summed over ranks and micro-batches."""

    def __init__(self, model: nn.Module, objective: Any, batches: Feed, config: TrainRun, ranks: Ranks) -> None:
        self.model, self.objective, self.batches, self.config, self.ranks = model, objective, batches, config, ranks
        self.reach = Reach(model)
        self.pooled = config.balance_over == "batch" and bool(declared(model))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.parts = micro_batches(config, ranks)

    def __call__(self, step: int, stop: Stop) -> Gradient:
        """Step number `step`, from 0. stop: read after the last backward pass; all ranks learn of it."""
        self.model.train()
        signals = signals_of(self.config, step)
        local = [self.batches.train(step, self.config.batch_size, *part) for part in self.parts]
        number: Tensor = torch.tensor(sum(self.objective.count(b) for b in local), device=self.ranks.device)
        ahead = self._ahead(local, signals) if self.pooled else []
        if not self.pooled:
            (number,) = self.ranks.add([number])
        sums = _Sums(torch.zeros((), dtype=torch.float64, device=self.ranks.device))
        totals: dict[TermKey, Stats] = {}
        for i, batch in enumerate(local):
            outcome = self._forward(batch, signals)
            if self.pooled and i == 0:
                totals, (number,) = pool(self.ranks, add_stats([_detached(outcome.trail), *ahead]), [number])
            if self.pooled:
                extra, sums.terms = total(outcome.trail.within(totals), self.reach)
            else:
                extra = self._apart(outcome.trail, self.objective.count(batch) / number, sums)
                ahead.append(_detached(outcome.trail))
            (outcome.loss / number + extra).backward()
            sums.nats += outcome.loss.detach()
            sums.tokens += batch.num_tokens
            sums.text_bytes += getattr(batch, "text_bytes", 0.0)
            for name, value in outcome.metrics.items():
                sums.metrics[name] = sums.metrics.get(name, 0.0) + value.detach().double()
            sums.note(outcome.trail)
        if not self.pooled:
            totals, _ = pool(self.ranks, add_stats(ahead), [])
        found = self._over_ranks(sums, totals, number, stop)
        settle(self.parameters)
        self.ranks.add_gradients(self.parameters)
        return found

    def _ahead(self, local: list[Any], signals: Signals) -> list[dict[TermKey, Stats]]:
        """Statistics of all micro-batches but the first, without gradient."""
        with torch.no_grad():
            return [_detached(self._forward(batch, signals).trail) for batch in local[1:]]

    def _forward(self, batch: Any, signals: Signals) -> Any:
        with autocast(self.ranks.device):
            return self.objective(self.model, batch.to(self.ranks.device), signals)

    def _apart(self, trail: Trail, weight: Tensor, sums: _Sums) -> Tensor | float:
        """The loss terms of one micro-batch by itself, weighted by its share of targets."""
        extra, values = total(trail, self.reach)
        for key, value in values.items():
            sums.terms[key] = sums.terms.get(key, 0.0) + value * weight
        return extra * weight

    def _over_ranks(self, sums: _Sums, totals: dict[TermKey, Stats], number: Tensor, stop: Stop) -> Gradient:
        """Sums over ranks in one message, then numbers brought over from the device in another."""
        own = [float(stop.requested), sums.tokens, sums.text_bytes]
        said = torch.tensor(own, dtype=torch.float64, device=self.ranks.device)
        terms = {} if self.pooled else sums.terms
        named = (sums.units, sums.counts, sums.load, sums.metrics)
        sent = [t for part in named for t in part.values()]
        nats, said, *rest = self.ranks.add([sums.nats, said, *sent, *terms.values()])
        left = iter(rest)
        units, counts, load, metrics = (dict(zip(part, left)) for part in named)
        values = sums.terms if self.pooled else dict(zip(terms, left))
        both = (*units.values(), *metrics.values(), *values.values())
        numbers = torch.stack([v.double() for v in (nats / number, number, *said, *both)])
        mean, targets, stopping, tokens, text_bytes, *more = numbers.tolist()
        numbers = iter(more)
        met = {path: int(n) for path, n in zip(units, numbers)}
        told, read = dict(zip(metrics, numbers)), dict(zip(values, numbers))
        weights = {key: term.loss.coefficient for key, term in sums.last.terms().items()}
        return Gradient(
            loss=mean + math.fsum(weights[key] * value for key, value in read.items()),
            nats=mean,
            targets=int(targets),
            tokens=int(tokens),
            text_bytes=text_bytes,
            metrics=told,
            terms=read,
            counts=counts,
            routing=_pooled(sums.last, met, counts, load, totals),
            stop=stopping > 0,
        )


def micro_batches(config: TrainRun, ranks: Ranks) -> list[tuple[int, int]]:
    """This rank's sequences of the global batch, in parts of at most `micro_batch`."""
    start, stop = ranks.share(config.batch_size)
    if config.batch_size < ranks.world:
        raise UserError(f"batch_size {config.batch_size} is smaller than the number of ranks {ranks.world}; raise it")
    size = config.micro_batch or stop - start
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]


def _detached(trail: Trail) -> dict[TermKey, Stats]:
    return {key: term.stats.detach() for key, term in trail.terms().items()}


def _units(record: Record) -> Tensor | None:
    if record.plan is None:
        return None
    if record.plan.valid is not None:
        return record.plan.valid.sum()
    return torch.tensor(num_units(record.plan), device=record.plan.weight.device)


def _pooled(
    trail: Trail,
    units: Mapping[str, int],
    counts: Mapping[str, Tensor],
    load: Mapping[str, Tensor],
    totals: Mapping[TermKey, Stats],
) -> Trail:
    """One record per layer for the whole batch. Statistics are those of the layer's last pass."""
    out: dict[Key, Record] = {}
    for key, record in trail.items():
        plan = None
        if record.plan is not None:
            T = units[key.path]
            plan = Plan(
                expert=torch.empty(T, 0, dtype=torch.int64),
                weight=torch.empty(T, 0),
                num_experts=record.plan.num_experts,
                virtual=record.plan.virtual if isinstance(record.plan, Plan) else (),
                kind=record.plan.kind,
            )
        terms = {
            name: dataclasses.replace(term, stats=totals[TermKey(key.path, key.pass_, name)])
            for name, term in record.terms.items()
        }
        out[Key(key.path)] = Record(plan=plan, demand=counts.get(key.path), load=load.get(key.path), terms=terms)
    return Trail(out)
