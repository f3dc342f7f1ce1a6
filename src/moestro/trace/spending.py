"""What units get: experts per unit, by layer and by label (21, arXiv 2403.07652), and how certain routers are (03)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import UserError
from ..core.plan import AnyPlan
from ..core.trail import Trail
from .metrics import choices
from .record import table_of
from .tables import Array, Sample, Table, Trace

__all__ = [
    "Certainty",
    "Spent",
    "certainty",
    "experts_by_label",
    "experts_by_layer",
    "experts_per_unit",
    "mean_experts",
    "quantile_labels",
    "spent",
]


# Experts per unit -------------------------------------------------------------------------------------------------


def experts_per_unit(table: Table, num_experts: int) -> Array:
    """[T] int64: how many real experts every unit chose, before capacity; 0 for padding."""
    unit, _ = choices(table, num_experts)
    return np.bincount(unit, minlength=table.units)


def mean_experts(trace: Trace) -> Array:
    """[N, L]: mean experts per valid unit of every row of counts and every layer, NaN where there was no unit."""
    units = trace.counts.units.astype(np.float64)
    chosen = trace.counts.demand.sum(-1)
    return np.divide(chosen, units, out=np.full(units.shape, np.nan), where=units > 0)


def experts_by_layer(trace: Trace, sample: Sample, pass_: int = 0) -> dict[str, float]:
    """path -> mean experts per valid unit of a sampled batch."""
    return {path: _mean(count[valid]) for path, count, valid in _counts(trace, sample, pass_)}


def experts_by_label(
    trace: Trace, sample: Sample, labels: Any, num_labels: int | None = None, pass_: int = 0
) -> dict[str, Array]:
    """path -> [M] mean experts of the valid units of each label (domain, task, quantile), NaN for labels without one.

    labels: [T] integers, -1 = none, or the name of a column of the sample.
    """
    if isinstance(labels, str):
        if labels not in sample.columns:
            raise UserError(f"the sample has no column {labels!r}; it has {', '.join(sorted(sample.columns))}")
        labels = sample.columns[labels]
    labels = np.asarray(labels).astype(np.int64)
    number = int(labels.max(initial=-1)) + 1 if num_labels is None else num_labels
    out: dict[str, Array] = {}
    for path, count, valid in _counts(trace, sample, pass_):
        out[path] = _by_label(path, count, valid, labels, number)
    return out


def quantile_labels(values: Any, parts: int = 4) -> Array:
    """[T] numbers, such as each token's loss -> [T] int64: 0 = the lowest part, parts - 1 = the highest, -1 for NaN.

    Parts are equal in size up to one unit; ties go by position.
    """
    values = np.asarray(values, np.float64).reshape(-1)
    out = np.full(len(values), -1, np.int64)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    out[order] = np.arange(len(order)) * parts // max(1, len(order))
    return out


class Spent(NamedTuple):
    """Mean experts per valid unit of one pass. mean: over layers. layers: path -> that layer's. by: [M] of the units of
    each label, over layers; NaN for labels without a unit, None without labels."""

    mean: float
    layers: dict[str, float]
    by: Array | None = None


def spent(trail: Trail, labels: Any = None, num_labels: int | None = None, pass_: int = 0) -> Spent:
    """What a pass spent on its units, before capacity, straight from its trail (traces: the functions above).

    labels: [T] integers, -1 = none, such as domains or `quantile_labels` of every token's loss. Layers weigh equally.
    Raises `UserError` where no layer has a plan, and where labels are not as many as units.
    """
    plans: list[tuple[str, AnyPlan]] = [(key.path, p) for key, p in trail.plans().items() if key.pass_ == pass_]
    if not plans:
        raise UserError("spent: no routed layer has a plan in this trail; was the pass quiet?")
    tables = [(path, table_of(plan, 0), plan.num_experts) for path, plan in plans]
    found = [
        (path, experts_per_unit(t, e), np.ones(t.units, bool) if t.valid is None else t.valid) for path, t, e in tables
    ]
    layers = {path: _mean(count[valid]) for path, count, valid in found}
    if labels is None:
        return Spent(float(np.mean(list(layers.values()))), layers)
    labels = np.asarray(labels).astype(np.int64).reshape(-1)
    number = int(labels.max(initial=-1)) + 1 if num_labels is None else num_labels
    by = np.mean([_by_label(path, count, valid, labels, number) for path, count, valid in found], axis=0)
    return Spent(float(np.mean(list(layers.values()))), layers, by)


# Certainty --------------------------------------------------------------------------------------------------------


class Certainty(NamedTuple):
    """Entropies of units' distributions, nats. mean, highest: of what was selected from; unmixed_mean,
    unmixed_highest: of the distribution before the router's mix step, the same where it has none."""

    mean: float
    highest: float
    unmixed_mean: float
    unmixed_highest: float


def certainty(trail: Trail, pass_: int = 0) -> dict[str, Certainty]:
    """path -> entropies over the valid units of every layer with a plan.

    Averaging raises the mean entropy where r is fixed (it is concave) and can lower the highest: hence both.
    The pass must have been run with `Signals(keep=frozenset({"probs", "extra"}))`; else a `UserError`.
    """
    plans: Mapping[str, AnyPlan] = {key.path: p for key, p in trail.plans().items() if key.pass_ == pass_}
    return {path: _certainty(path, plan) for path, plan in plans.items()}


def _certainty(path: str, plan: AnyPlan) -> Certainty:
    if plan.probs is None:
        raise UserError(f"{path!r} kept no probabilities; run with Signals(keep=frozenset({{'probs', 'extra'}}))")
    before = plan.extra.get("unmixed_probs", plan.probs)
    made = []
    for table in (plan.probs, before):
        probs = table.detach().double().cpu().numpy()
        share = probs / np.maximum(probs.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
        entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)
        entropy = entropy if plan.valid is None else entropy[plan.valid.cpu().numpy()]
        made += [_mean(entropy), float(entropy.max()) if entropy.size else float("nan")]
    return Certainty(*made)


def _counts(trace: Trace, sample: Sample, pass_: int) -> list[tuple[str, Array, Array]]:
    """(path, [T] experts per unit, [T] valid) of every layer that the sample has."""
    out = []
    for number, layer in enumerate(trace.layers):
        table = sample.table(number, pass_)
        if table is not None:
            valid = np.ones(table.units, bool) if table.valid is None else table.valid
            out.append((layer.path, experts_per_unit(table, layer.num_experts), valid))
    return out


def _by_label(path: str, count: Array, valid: Array, labels: Array, number: int) -> Array:
    """[number] mean counts of the valid units of each label."""
    if len(labels) != len(count):
        raise UserError(f"{len(labels)} labels for {len(count)} units of {path!r}")
    known = valid & (labels >= 0) & (labels < number)
    total = np.bincount(labels[known], weights=count[known], minlength=number)
    units = np.bincount(labels[known], minlength=number)
    return np.divide(total, units, out=np.full(number, np.nan), where=units > 0)


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else float("nan")
