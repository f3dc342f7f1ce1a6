"""Numbers read off routing: load, balance, entropy, saturation, co-activation, specialisation. Plain numpy functions.

Counts are arrays whose last axis is the experts of one layer; tables are those of a trace (`tables.Table`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import UserError
from .tables import Array, Sample, Table, Trace

__all__ = [
    "Silent",
    "avg_violation",
    "choices",
    "coactivation",
    "coactivation_share",
    "dead_experts",
    "dropped_share",
    "label_counts",
    "label_information",
    "label_share",
    "load_entropy",
    "load_share",
    "max_violation",
    "min_violation",
    "saturation",
    "token_counts",
]


# Load -------------------------------------------------------------------------------------------------------------


def load_share(counts: Any) -> Array:
    """counts [..., E] -> each expert's share of its layer, NaN where nothing was counted."""
    counts = np.asarray(counts, np.float64)
    return _over(counts, counts.sum(-1, keepdims=True))


def max_violation(counts: Any) -> Array:
    """[..., E] -> (max - mean) / mean: 0 when equal, E - 1 when one expert takes all (MaxVio, loss-free balancing)."""
    counts = np.asarray(counts, np.float64)
    mean = counts.mean(-1)
    return _over(counts.max(-1) - mean, mean)


def min_violation(counts: Any) -> Array:
    """[..., E] -> (mean - min) / mean: 0 when equal, 1 when an expert has nothing."""
    counts = np.asarray(counts, np.float64)
    mean = counts.mean(-1)
    return _over(mean - counts.min(-1), mean)


def avg_violation(counts: Any) -> Array:
    """[..., E] -> mean |count - mean| / mean."""
    counts = np.asarray(counts, np.float64)
    mean = counts.mean(-1)
    return _over(np.abs(counts - mean[..., None]).mean(-1), mean)


def load_entropy(counts: Any) -> Array:
    """[..., E] -> entropy of the load shares divided by log E: 1 when equal, 0 when one expert takes all."""
    share = load_share(counts)
    experts = share.shape[-1]
    return _entropy(share) / np.log(experts) if experts > 1 else np.ones(share.shape[:-1])


def dropped_share(demand: Any, load: Any) -> Array:
    """[..., E] twice -> share of the choices that were lost to capacity, NaN where none was made."""
    wanted = np.asarray(demand, np.float64).sum(-1)
    return _over(wanted - np.asarray(load, np.float64).sum(-1), wanted)


class Silent(NamedTuple):
    """An expert that nobody chose. steps: for how many training steps up to the last one; path: its layer."""

    path: str
    expert: int
    steps: int


def dead_experts(trace: Trace, steps: int = 100) -> list[Silent]:
    """Experts without a token in the last `steps` training steps of the trace (fewer, if it is shorter).

    Rows that sum several steps are taken whole, so an expert is named only if it was silent at least that long.
    """
    c, out = trace.counts, []
    if not len(c):
        return out
    end = int(c.last[-1])
    for number, layer in enumerate(trace.layers):
        seen = trace.demand(number) > 0
        for expert in range(layer.num_experts):
            rows = np.flatnonzero(seen[:, expert])
            since = end - int(c.last[rows[-1]]) if len(rows) else end - int(c.first[0]) + 1
            if since >= min(steps, end - int(c.first[0]) + 1):
                out.append(Silent(layer.path, expert, since))
    return out


# Tables -----------------------------------------------------------------------------------------------------------


def choices(table: Table, num_experts: int) -> tuple[Array, Array]:
    """(unit [R], expert [R]) int64 of every choice of a real expert by a valid unit, before capacity.

    Of an expert-choice table: the filled slots. Of a dense one: all pairs.
    """
    valid = np.ones(table.units, bool) if table.valid is None else table.valid
    if table.expert is not None:
        unit, k = np.nonzero((table.expert >= 0) & (table.expert < num_experts) & valid[:, None])
        return unit, table.expert[unit, k].astype(np.int64)
    if table.unit is not None:
        group, expert, slot = np.nonzero(table.unit >= 0)
        unit = table.unit[group, expert, slot].astype(np.int64)
        return unit[valid[unit]], expert[valid[unit]]
    unit, expert = np.nonzero(np.broadcast_to(valid[:, None], (table.units, num_experts)))
    return unit, expert


def saturation(trace: Trace, early: Sample, late: Sample, pass_: int = 0) -> dict[str, float]:
    """path -> share of the late sample's choices that the early one made too, for the same tokens (OLMoE, section 5.1).

    That is the mean over units of |early experts and late experts| / k. Raises `UserError` for other tokens.
    """
    same = {n: (early.columns.get(n), late.columns.get(n)) for n in ("token", "position")}
    for name, (a, b) in same.items():
        if (a is None) != (b is None) or (a is not None and b is not None and not np.array_equal(a, b)):
            raise UserError(f"saturation compares routings of the same tokens; these samples differ in {name!r}")
    out: dict[str, float] = {}
    for number, layer in enumerate(trace.layers):
        a, b = early.table(number, pass_), late.table(number, pass_)
        if a is None or b is None:
            continue
        if a.units != b.units:
            raise UserError(f"saturation of {layer.path!r}: {a.units} units against {b.units}")
        then, now = _membership(a, layer.num_experts), _membership(b, layer.num_experts)
        out[layer.path] = float((then & now).sum() / now.sum()) if now.any() else float("nan")
    return out


def coactivation(table: Table, num_experts: int) -> Array:
    """[E, E] int64: number of units that chose both experts; on the diagonal, that chose the expert at all."""
    member = _membership(table, num_experts).astype(np.float32)
    total = np.zeros((num_experts, num_experts))
    for start in range(0, len(member), 65536):  # float32 products of zeros and ones are exact in such blocks
        block = member[start : start + 65536]
        total += block.T @ block
    return total.astype(np.int64)


def coactivation_share(table: Table, num_experts: int) -> Array:
    """[E, E]: entry (i, j) = share of expert i's units that also chose expert j (OLMoE, section 5.2); diagonal NaN."""
    counts = coactivation(table, num_experts).astype(np.float64)
    share = _over(counts, np.diag(counts)[:, None])
    np.fill_diagonal(share, np.nan)
    return share


# Specialisation ---------------------------------------------------------------------------------------------------


def label_counts(table: Table, labels: Any, num_labels: int, num_experts: int) -> Array:
    """labels [T], -1 = none -> [M, E] int64: choices of each expert by units of each label."""
    labels = np.asarray(labels)
    if len(labels) != table.units:
        raise UserError(f"{len(labels)} labels for {table.units} units")
    unit, expert = choices(table, num_experts)
    label = labels[unit].astype(np.int64)
    known = (label >= 0) & (label < num_labels)
    flat = np.bincount(label[known] * num_experts + expert[known], minlength=num_labels * num_experts)
    return flat.reshape(num_labels, num_experts)


def label_share(counts: Any) -> Array:
    """[M, E] -> each label's choices as shares over experts (OLMoE, section 5.3), NaN for labels that do not occur."""
    return load_share(counts)


def label_information(counts: Any) -> tuple[float, float]:
    """[M, E] -> (mutual information of label and expert in nats, the same over the entropy of the labels: 0 to 1)."""
    counts = np.asarray(counts, np.float64)
    if not counts.sum():
        return float("nan"), float("nan")
    joint = counts / counts.sum()
    labels, experts = _entropy(joint.sum(1)), _entropy(joint.sum(0))
    information = max(float(labels + experts - _entropy(joint.reshape(-1))), 0.0)
    return information, information / float(labels) if labels > 0 else 0.0


def token_counts(table: Table, tokens: Any, num_experts: int) -> Mapping[int, Array]:
    """tokens [T] -> token id -> [E] int64, how often each expert was chosen by that token."""
    ids, inverse = np.unique(np.asarray(tokens), return_inverse=True)
    counts = label_counts(table, inverse.reshape(-1), len(ids), num_experts)
    return {int(i): row for i, row in zip(ids, counts)}


def _membership(table: Table, num_experts: int) -> Array:
    """[T, E] bool."""
    member = np.zeros((table.units, num_experts), bool)
    member[choices(table, num_experts)] = True
    return member


def _entropy(share: Array) -> Array:
    return -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)


def _over(a: Array, b: Array) -> Array:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.broadcast_shapes(np.shape(a), np.shape(b)), np.nan), where=b != 0)
