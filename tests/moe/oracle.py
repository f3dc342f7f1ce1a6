"""The routed layer in float64, choice by choice, given the plan."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.core.plan import AnyPlan, ExpertChoice, Plan

Values = dict[str, Tensor]


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (F.silu(gate) * up)


def choices(plan: AnyPlan) -> list[tuple[int, int, tuple[int, ...]]]:
    """(unit, expert, place in the weight table) of every row."""
    found = []
    for place in plan.routed().nonzero().tolist():
        if isinstance(plan, Plan):
            unit, expert = place[0], int(plan.expert[tuple(place)])
        elif isinstance(plan, ExpertChoice):
            unit, expert = int(plan.unit[tuple(place)]), place[1]
        else:
            unit, expert = place
        found.append((unit, expert, tuple(place)))
    return found


def layer(p: Values, x: Tensor, plan: AnyPlan, weight: Tensor, valid: Tensor | None = None) -> Tensor:
    """[T, D] of x [T, D] with gated experts, an optional shared expert (with or without gate), and copies."""
    units = []
    gate_up, down = p["experts.gate_up"].unbind(0), p["experts.down"].unbind(0)
    rows = choices(plan)
    for t in range(x.shape[0]):
        y = torch.zeros(x.shape[1], dtype=torch.float64)
        for unit, e, place in rows:
            if unit == t:
                y = y + weight[place] * swiglu(x[t], gate_up[e], down[e])
        if isinstance(plan, Plan):
            for k, e in enumerate(plan.expert[t].tolist()):
                if e >= plan.num_experts and plan.virtual[e - plan.num_experts] == "copy":
                    y = y + weight[t, k] * x[t]
        if "shared.down" in p:
            alone = swiglu(x[t], p["shared.gate_up"].unbind(0)[0], p["shared.down"].unbind(0)[0])
            if "shared_gate.weight" in p:
                alone = torch.sigmoid(p["shared_gate.weight"][0] @ x[t]) * alone
            y = y + alone
        units.append(y if valid is None or bool(valid[t]) else torch.zeros_like(y))
    return torch.stack(units)
