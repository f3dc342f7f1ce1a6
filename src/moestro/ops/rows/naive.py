"""Rows of a plan by sorting Python tuples."""

from __future__ import annotations

import torch

from ...core.plan import AnyPlan, Dense, Plan, num_units
from ...core.rows import Rows

__all__ = ["rows"]


def rows(plan: AnyPlan) -> Rows:
    """The rows of a plan, sorted by expert, then unit, then position in the plan's weight table."""
    found: list[tuple[int, int, int]] = []  # expert, unit, source
    routed = plan.routed()
    for position in routed.nonzero().tolist():
        place = tuple(position)
        source = 0
        for size, i in zip(routed.shape, place):
            source = source * size + i
        if isinstance(plan, Plan):
            found.append((int(plan.expert[place]), place[0], source))
        elif isinstance(plan, Dense):
            found.append((place[1], place[0], source))
        else:
            found.append((place[1], int(plan.unit[place]), source))
    found.sort()
    T, E = num_units(plan), plan.num_experts
    times = [0] * T
    slots: list[int] = []
    for _, unit, source in found:
        slots.append(times[unit] if routed.ndim == 3 else source % routed.shape[1])
        times[unit] += 1
    K = max(times, default=0) if routed.ndim == 3 else routed.shape[1]
    inverse = torch.full((T, K), -1, dtype=torch.int64)
    for r, ((_, unit, _), slot) in enumerate(zip(found, slots)):
        inverse[unit, slot] = r
    offsets = [sum(f[0] < e for f in found) for e in range(E + 1)]
    table = torch.tensor(found, dtype=torch.int64).reshape(-1, 3)
    return Rows(
        unit=table[:, 1],
        slot=torch.tensor(slots, dtype=torch.int64),
        expert=table[:, 0],
        offsets=torch.tensor(offsets, dtype=torch.int64),
        inverse=inverse,
        source=table[:, 2],
        num_experts=E,
        num_units=T,
        capacity=plan.capacity if isinstance(plan, Plan) else None,
    )
