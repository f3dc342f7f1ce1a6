"""The recorder: counts of every training step, full tables of sampled batches, in bounded memory.

The trainer calls `count` with the trail of every micro-batch and `sample` with that of a batch worth keeping;
`write` at checkpoints; `resume` to go on exactly where a file ends.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.plan import AnyPlan, Dense, ExpertChoice, Plan, demand, load, num_units
from ..core.stats import Stats
from ..core.trail import Record, Trail
from ..core.version import __version__
from .config import Recording
from .read import read
from .tables import Array, Counts, Layer, Sample, Table, Trace
from .write import smallest, write

__all__ = ["Recorder", "routing_stats", "table_of"]

_INTEGER = ("demand", "load", "units", "entropy_units")  # the order of a row's integers
_HELD = 32  # steps whose counts may wait on the device before one transfer brings them over


@dataclasses.dataclass
class _Row:
    """Sums of steps first..last: per layer, [2E + 2] int64 = demand, load, units, entropy units; and entropy."""

    first: int
    last: int
    counts: dict[int, Array]
    entropy: dict[int, float]

    def add(self, other: _Row) -> None:
        self.last = max(self.last, other.last)
        for layer, values in other.counts.items():
            self.counts[layer] = self.counts[layer] + values if layer in self.counts else values
        for layer, value in other.entropy.items():
            self.entropy[layer] = self.entropy.get(layer, 0.0) + value


class Recorder:
    """Collects the routing of a run. Errors: `UserError` for steps that go back and layers that change.

    labels: kind -> names, for columns called label.<kind>. pieces: token id -> its text, asked when a trace is made for
    the ids that occur in samples; None for bytes. run, model, data: JSON objects kept in the header.
    """

    def __init__(
        self,
        config: Recording | None = None,
        *,
        labels: Mapping[str, Iterable[str]] | None = None,
        tokenizer: str = "bytes",
        pieces: Callable[[int], str] | None = None,
        run: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config or Recording()
        self._labels = {kind: tuple(names) for kind, names in (labels or {}).items()}
        self._tokenizer, self._pieces, self._known_pieces = tokenizer, pieces, {}
        self._objects = {"run": dict(run or {}), "model": dict(model or {}), "data": dict(data or {})}
        self._layers: dict[str, Layer] = {}
        self._rows: list[_Row] = []
        self._stride = 1
        self._waiting: list[tuple[int, list[tuple[int, int]], Tensor, Tensor]] = []
        self._samples: list[Sample] = []

    # Counts -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def count(self, step: int, source: Trail | Mapping[str, Stats]) -> None:
        """Add counts to the row of `step`: the trail of every micro-batch, or once the pooled `routing_stats`.

        Nothing is moved off the device before a few dozen steps have come together.
        """
        last = self._waiting[-1][0] if self._waiting else self._rows[-1].last if self._rows else step
        if step < last:
            raise UserError(f"counts of step {step} come after those of step {last}; call cut({step - 1}) on resume")
        if isinstance(source, Trail):
            for key, plan in source.plans().items():
                self._layer(key.path, plan.num_experts, plan)
        stats = routing_stats(source) if isinstance(source, Trail) else source
        layout = [(self._layer(path, len(s["demand"]), None), len(s["demand"])) for path, s in stats.items()]
        if layout:
            flat = torch.cat([s[name].reshape(-1) for s in stats.values() for name in _INTEGER])
            self._waiting.append((step, layout, flat, torch.stack([s["entropy"] for s in stats.values()])))
        if len(self._waiting) >= _HELD:
            self._settle()

    def cut(self, after: int) -> None:
        """Forget rows and samples of steps later than `after`; a row of several steps that straddles it goes too."""
        self._settle()
        self._rows = [row for row in self._rows if row.last <= after]
        self._samples = [sample for sample in self._samples if sample.step <= after]

    def _settle(self) -> None:
        """Bring waiting counts to rows."""
        for step, layout, integers, entropies in self._waiting:
            numbers, start = integers.cpu().numpy(), 0
            row = _Row(step, step, {}, {})
            for (layer, E), entropy in zip(layout, entropies.tolist()):
                row.add(_Row(step, step, {layer: numbers[start : start + 2 * E + 2]}, {layer: entropy}))
                start += 2 * E + 2
            if self._rows and step - self._rows[-1].first < self._stride:
                self._rows[-1].add(row)
            else:
                self._rows.append(row)
            if len(self._rows) > self.config.max_rows:
                self._halve()
        self._waiting = []

    def _halve(self) -> None:
        """Double the number of steps per row."""
        self._stride *= 2
        rows: list[_Row] = []
        for row in self._rows:
            if rows and row.last - rows[-1].first < self._stride:
                rows[-1].add(row)
            else:
                rows.append(row)
        self._rows = rows

    def _layer(self, path: str, num_experts: int, plan: AnyPlan | None) -> int:
        made = Layer(path=path, num_experts=num_experts)
        if plan is not None:
            virtual = plan.virtual if isinstance(plan, Plan) else ()
            made = dataclasses.replace(made, virtual=virtual, kind=plan.kind)
        known = self._layers.setdefault(path, made)
        if known.num_experts != num_experts:
            raise UserError(
                f"layer {path!r} had {known.num_experts} experts and now has {num_experts}; use a new trace"
            )
        if plan is not None and known != made:
            self._layers[path] = made
        return list(self._layers).index(path)

    # Samples ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, step: int, name: str, trail: Trail, columns: Mapping[str, Any]) -> None:
        """Keep the whole table of every layer for one batch.

        name: what was sampled ("valid", "train"); thinning and comparisons are among samples of one name.
        columns: name -> [T] tensor or array per unit: token, position, segment, loss, label.<kind>, ...
        """
        most = self.config.max_units
        kept = {n: _array(v).reshape(-1)[:most] for n, v in columns.items()}
        for n, values in kept.items():
            kept[n] = smallest(values) if values.dtype.kind in "iub" else values.astype(np.float32)
        if len({len(v) for v in kept.values()}) > 1:
            raise UserError(f"columns of unequal length: {', '.join(f'{n} {len(v)}' for n, v in kept.items())}")
        tables = []
        for key, plan in trail.plans().items():
            number = self._layer(key.path, plan.num_experts, plan)
            tables.append(table_of(plan, number, key.pass_, most, self.config.weights))
        self._samples.append(Sample(step=step, name=name, columns=kept, tables=tuple(tables)))
        same = [s for s in self._samples if s.name == name]
        if len(same) > self.config.max_samples:
            gone = {id(s) for s in same[1:-1:2]}
            self._samples = [s for s in self._samples if id(s) not in gone]

    # Out and in ---------------------------------------------------------------------------------------------------

    def trace(self) -> Trace:
        """What was recorded so far."""
        self._settle()
        N, L = len(self._rows), len(self._layers)
        E = max((layer.num_experts for layer in self._layers.values()), default=0)
        counts = np.zeros((N, L, 2 * E + 2), np.int64)
        entropy = np.zeros((N, L))
        for i, row in enumerate(self._rows):
            for layer, values in row.counts.items():
                e = (len(values) - 2) // 2
                counts[i, layer, :e], counts[i, layer, E : E + e] = values[:e], values[e : 2 * e]
                counts[i, layer, -2:] = values[-2:]
            for layer, value in row.entropy.items():
                entropy[i, layer] = value
        return Trace(
            layers=tuple(self._layers.values()),
            counts=Counts(
                first=np.array([row.first for row in self._rows], np.int64),
                last=np.array([row.last for row in self._rows], np.int64),
                demand=counts[:, :, :E],
                load=counts[:, :, E : 2 * E],
                units=counts[:, :, -2],
                entropy=entropy,
                entropy_units=counts[:, :, -1],
            ),
            samples=tuple(self._samples),
            labels=self._labels,
            tokenizer=self._tokenizer,
            pieces=self._texts(),
            code={"moestro": __version__, "torch": torch.__version__, "python": platform.python_version()},
            **self._objects,
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the trace; the path holds the old file or the whole new one at any moment."""
        write(self.trace(), path)

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        config: Recording | None = None,
        *,
        after: int | None = None,
        pieces: Callable[[int], str] | None = None,
    ) -> Recorder:
        """A recorder that goes on from a file, with what came after step `after` forgotten."""
        trace = read(path)
        made = cls(
            config,
            labels=trace.labels,
            tokenizer=trace.tokenizer,
            pieces=pieces,
            run=trace.run,
            model=trace.model,
            data=trace.data,
        )
        made._known_pieces = dict(trace.pieces)
        made._layers = {layer.path: layer for layer in trace.layers}
        made._samples = list(trace.samples)
        c = trace.counts
        for i in range(len(c)):
            row = _Row(int(c.first[i]), int(c.last[i]), {}, {})
            for number in range(len(trace.layers)):
                tail = [c.units[i, number], c.entropy_units[i, number]]
                row.counts[number] = np.concatenate([trace.demand(number)[i], trace.load(number)[i], tail])
                row.entropy[number] = float(c.entropy[i, number])
            made._rows.append(row)
        widest = int((c.last - c.first).max()) + 1 if len(c) else 1
        made._stride = 1 << (widest - 1).bit_length()
        if after is not None:
            made.cut(after)
        return made

    def _texts(self) -> dict[int, str]:
        if self._pieces is None:
            return dict(self._known_pieces)
        for sample in self._samples:
            for i in np.unique(sample.columns.get("token", np.empty(0, np.int64))).tolist():
                if i >= 0 and i not in self._known_pieces:
                    self._known_pieces[i] = self._pieces(i)
        return dict(self._known_pieces)


@torch.no_grad()
def routing_stats(trail: Trail) -> dict[str, Stats]:
    """What a trace counts, per module path and summed over passes; additive over micro-batches and ranks.

    Sums: demand, load [E] int64; units [] int64 valid units; entropy [] float64 sum of nats over entropy_units [] int64
    units, from the layer's `routing_entropy` term, else from the plan's probabilities where they were kept.
    """
    out: dict[str, Stats] = {}
    for key, record in trail.items():
        plan, wanted, received = record.plan, record.demand, record.load
        if plan is not None:
            wanted = demand(plan) if wanted is None else wanted
            received = load(plan) if received is None else received
        if wanted is None:
            continue
        if plan is None:
            units = torch.zeros((), dtype=torch.int64, device=wanted.device)
        elif plan.valid is not None:
            units = plan.valid.sum()
        else:
            units = torch.full((), num_units(plan), dtype=torch.int64, device=wanted.device)
        entropy, over = _entropy_of(record, units)
        sums = (wanted, wanted if received is None else received, units, over, entropy)
        stats = Stats(dict(zip((*_INTEGER, "entropy"), sums, strict=True)))
        out[key.path] = out[key.path] + stats if key.path in out else stats
    return out


def table_of(plan: AnyPlan, layer: int, pass_: int = 0, most: int | None = None, weights: str = "float16") -> Table:
    """The first `most` units of a plan as a table of numpy arrays."""
    T = num_units(plan) if most is None else min(num_units(plan), most)
    cut = slice(None, T)
    weight = _array(plan.weight).astype(weights)
    expert = unit = kept = capacity = None
    complete = False
    if isinstance(plan, Plan):
        expert, weight = smallest(_array(plan.expert)[cut], (np.int8, np.int16, np.int32)), weight[cut]
        kept = None if plan.kept is None else _array(plan.kept)[cut]
        capacity, complete = plan.capacity, plan.complete
    elif isinstance(plan, ExpertChoice):
        unit = _array(plan.unit)
        weight = np.where(unit < T, weight, np.zeros((), weight.dtype))
        unit = smallest(np.where(unit < T, unit, -1), (np.int8, np.int16, np.int32))
    else:
        weight = weight[cut]
    entropy = None if plan.probs is None else _array(_entropy(plan.probs))[cut].astype(weights)
    meta = {n: smallest(_array(v).reshape(-1)[cut]) for n, v in plan.meta.items() if not v.is_floating_point()}
    return Table(
        layer=layer,
        pass_=pass_,
        type="Dense" if isinstance(plan, Dense) else type(plan).__name__,
        units=T,
        weight=weight,
        expert=expert,
        unit=unit,
        kept=kept,
        valid=None if plan.valid is None else _array(plan.valid)[cut],
        entropy=entropy,
        meta=meta,
        capacity=capacity,
        complete=complete,
    )


def _array(values: Any) -> Array:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()


def _entropy_of(record: Record, units: Tensor) -> tuple[Tensor, Tensor]:
    """([] float64 sum of entropies, [] int64 over how many units); zeros where the entropy is not known."""
    term = record.terms.get("routing_entropy")
    if term is not None and term.stats.sums.keys() >= {"entropy", "units"}:
        return term.stats["entropy"].detach().double(), term.stats["units"]
    if record.plan is None or record.plan.probs is None:
        return torch.zeros((), dtype=torch.float64, device=units.device), torch.zeros_like(units)
    entropy = _entropy(record.plan.probs)
    if record.plan.valid is not None:
        entropy = torch.where(record.plan.valid, entropy, 0.0)
    return entropy.sum().double(), units


def _entropy(probs: Tensor) -> Tensor:
    """[T] nats; scores that are no distribution are divided by their sum."""
    tiny = torch.finfo(probs.dtype).tiny
    probs = probs / probs.sum(-1, keepdim=True).clamp_min(tiny)
    return -(probs * torch.log(probs.clamp_min(tiny))).sum(-1)
