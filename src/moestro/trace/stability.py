"""How much routing differs between two models, or two states of one, on the same units: fluctuation and Jaccard index.

Both compare the sets of real experts that a unit chose, before capacity, layer by layer (03, arXiv 2505.00792).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..core.errors import UserError
from ..core.trail import Trail
from .metrics import choices
from .record import table_of
from .tables import Array, Sample, Table, Trace

__all__ = ["Sets", "fluctuation", "fluctuation_rate", "jaccard", "sets", "sets_of_sample"]


class Sets(NamedTuple):
    """The experts that units chose. member: [T, E] bool. valid: [T] bool, False = padding."""

    member: Array
    valid: Array


def sets(trail: Trail, pass_: int = 0) -> dict[str, Sets]:
    """path -> what was chosen there, of every layer with a plan in this pass."""
    plans = {key.path: plan for key, plan in trail.plans().items() if key.pass_ == pass_}
    return {path: _sets(table_of(plan, 0), plan.num_experts) for path, plan in plans.items()}


def sets_of_sample(trace: Trace, sample: Sample, pass_: int = 0) -> dict[str, Sets]:
    """The same of a sampled batch in a trace."""
    tables = ((layer, sample.table(number, pass_)) for number, layer in enumerate(trace.layers))
    return {layer.path: _sets(table, layer.num_experts) for layer, table in tables if table is not None}


def fluctuation(early: Mapping[str, Sets], late: Mapping[str, Sets]) -> dict[str, float]:
    """path -> share of valid units whose set of experts is another one: 0 of a model against itself.

    Raises `UserError` for other layers, units or padding.
    """
    return {path: _mean(_moved(a, b)) for path, a, b in _pairs(early, late)}


def fluctuation_rate(early: Mapping[str, Sets], late: Mapping[str, Sets]) -> float:
    """The share of all (unit, layer) pairs whose set of experts is another one."""
    return _mean(np.concatenate([np.zeros(0, bool), *(_moved(a, b) for _, a, b in _pairs(early, late))]))


def jaccard(early: Mapping[str, Sets], late: Mapping[str, Sets]) -> dict[str, float]:
    """path -> mean over valid units of |A and B| / |A or B|: 1 for equal sets (two empty ones too), 0 for disjoint."""
    out: dict[str, float] = {}
    for path, a, b in _pairs(early, late):
        both, either = (a.member & b.member)[a.valid].sum(1), (a.member | b.member)[a.valid].sum(1)
        out[path] = _mean(np.where(either > 0, both / np.maximum(either, 1), 1.0))
    return out


def _moved(a: Sets, b: Sets) -> Array:
    return (a.member != b.member)[a.valid].any(1)


def _sets(table: Table, num_experts: int) -> Sets:
    member = np.zeros((table.units, num_experts), bool)
    member[choices(table, num_experts)] = True
    return Sets(member, np.ones(table.units, bool) if table.valid is None else table.valid)


def _pairs(early: Mapping[str, Sets], late: Mapping[str, Sets]) -> list[tuple[str, Sets, Sets]]:
    if early.keys() != late.keys():
        apart = ", ".join(sorted(early.keys() ^ late.keys()))
        raise UserError(f"routings of the same layers can be compared; only one of the two has {apart}")
    for path, a in early.items():
        b = late[path]
        if a.member.shape != b.member.shape or not np.array_equal(a.valid, b.valid):
            raise UserError(
                f"routings of the same units can be compared; {path!r} has {a.member.shape[0]} units and "
                f"{a.member.shape[1]} experts in one, {b.member.shape[0]} and {b.member.shape[1]} in the other, or "
                "other padding"
            )
    return [(path, early[path], late[path]) for path in early]


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else float("nan")
