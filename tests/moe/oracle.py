"""The routed layer in float64, choice by choice, given the plan."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.core.plan import AnyPlan
from moestro.testing.oracle import mixture

Values = dict[str, Tensor]


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (F.silu(gate) * up)


def layer(p: Values, x: Tensor, plan: AnyPlan, weight: Tensor, valid: Tensor | None = None) -> Tensor:
    """[T, D] of x [T, D] with gated experts, an optional shared expert (with or without gate), and copies."""
    gate_up, down = p["experts.gate_up"].unbind(0), p["experts.down"].unbind(0)
    y = mixture(plan, x, lambda e, unit: swiglu(unit, gate_up[e], down[e]), weight)
    if "shared.down" in p:
        shared = [swiglu(unit, p["shared.gate_up"].unbind(0)[0], p["shared.down"].unbind(0)[0]) for unit in x]
        if "shared_gate.weight" in p:
            shared = [torch.sigmoid(p["shared_gate.weight"][0] @ unit) * alone for unit, alone in zip(x, shared)]
        y = y + torch.stack(shared)
    return y if valid is None else torch.where(valid[:, None], y, 0.0)
