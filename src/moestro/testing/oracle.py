"""The float64 oracle of a whole routed layer: a double loop over units and choices, given the plan."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.carry import Carry, Replay
from ..core.plan import AnyPlan, Dense, ExpertChoice, Plan
from ..core.signals import Signals
from ..experts.gated import GatedBank
from ..experts.mlp import MLPBank
from ..experts.modules import ModuleBank
from ..moe.layer import MoELayer

__all__ = ["choices", "layer_oracle"]

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}


def choices(plan: AnyPlan) -> list[tuple[int, int, Tensor]]:
    """(unit, expert id, weight []) of every row and every copy, in the order of units."""
    out: list[tuple[int, int, Tensor]] = []
    if isinstance(plan, Dense):
        routed = plan.routed()
        for t in range(plan.weight.shape[0]):
            out += [(t, e, plan.weight[t, e]) for e in range(plan.num_experts) if routed[t, e]]
    elif isinstance(plan, ExpertChoice):
        routed = plan.routed()
        for g, e, c in routed.nonzero().tolist():
            out.append((int(plan.unit[g, e, c]), e, plan.weight[g, e, c]))
        out.sort(key=lambda row: (row[0], row[1]))
    else:
        live = plan.active() if plan.kept is None else plan.active() & plan.kept
        for t, k in live.nonzero().tolist():
            out.append((t, int(plan.expert[t, k]), plan.weight[t, k]))
    return out


def layer_oracle(layer: MoELayer, x: Tensor, signals: Signals, plan: AnyPlan) -> tuple[Tensor, MoELayer]:
    """y [T, D] in float64 with its graph, and the float64 copy of the layer that the graph leads to.

    The choices are those of `plan`; weights are computed anew in float64, from the same choices, by the copy's router.
    """
    exact = copy.deepcopy(layer).double()
    wide = x.double()
    given = Carry(own={"": Replay(plan)}) if isinstance(plan, Plan) else Carry()
    again, _ = exact.router(wide, signals, given)
    table = choices(again)
    want = [(t, e) for t, e, _ in choices(plan)]
    if [(t, e) for t, e, _ in table] != want:
        raise AssertionError("oracle: selection in float64 differs from the plan")
    rows: list[list[Tensor]] = [[] for _ in range(x.shape[0])]
    for t, e, weight in table:
        if e >= plan.num_experts:
            assert isinstance(plan, Plan)
            if plan.virtual[e - plan.num_experts] == "copy":
                rows[t].append(weight * wide[t])
        else:
            rows[t].append(weight * _expert(exact, e, wide[t]))
    y = torch.stack([torch.stack(r).sum(0) if r else wide[t] * 0 for t, r in enumerate(rows)])
    return y, exact


def _expert(layer: MoELayer, e: int, x: Tensor) -> Tensor:
    """Expert e of the layer's bank on one unit [D], from the bank's parameters alone."""
    bank = layer.experts
    if isinstance(bank, ModuleBank):
        return list(bank.children())[e](x[None])[0]
    act = ACTIVATIONS[bank.config.activation]
    if isinstance(bank, GatedBank):
        if bank.widths is None:
            first, down = bank.gate_up.unbind(0)[e], bank.down.unbind(0)[e]
        else:
            first = bank.gate_up.split([2 * f for f in bank.widths])[e]
            down = bank.down.split(list(bank.widths))[e].t()
        gate, up = (first @ x).chunk(2)
        return down @ (act(gate) * up)
    if isinstance(bank, MLPBank):
        hidden = bank.up.unbind(0)[e] @ x
        if bank.up_bias is None or bank.down_bias is None:
            return bank.down.unbind(0)[e] @ act(hidden)
        return bank.down.unbind(0)[e] @ act(hidden + bank.up_bias.unbind(0)[e]) + bank.down_bias.unbind(0)[e]
    raise AssertionError(f"oracle: no reference for a bank of type {type(bank).__name__}")
