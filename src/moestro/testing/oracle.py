"""The float64 oracle of a whole routed layer: a double loop over units and choices, given the plan."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.carry import Carry, Replay
from ..core.plan import AnyPlan, Dense, Plan
from ..core.signals import Signals
from ..experts.clamped import ClampedGatedBank
from ..experts.extended import ExtendedBank
from ..experts.gated import GatedBank
from ..experts.mlp import MLPBank
from ..experts.modules import ModuleBank
from ..moe.layer import MoELayer

__all__ = ["choices", "layer_oracle", "mixture"]

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
}


def choices(plan: AnyPlan, weight: Tensor | None = None) -> list[tuple[int, int, Tensor]]:
    """(unit, id, weight []) of every row and every copy, in the order of units. weight: in place of the plan's own."""
    weight = plan.weight if weight is None else weight
    if isinstance(plan, Plan):
        live = plan.active() if plan.kept is None else plan.active() & plan.kept
        return [(t, int(plan.expert[t, k]), weight[t, k]) for t, k in live.nonzero().tolist()]
    found = plan.routed().nonzero().tolist()
    if isinstance(plan, Dense):
        return [(t, e, weight[t, e]) for t, e in found]
    table = [(int(plan.unit[g, e, c]), e, weight[g, e, c]) for g, e, c in found]
    return sorted(table, key=lambda row: row[:2])


def mixture(plan: AnyPlan, x: Tensor, expert: Callable[[int, Tensor], Tensor], weight: Tensor | None = None) -> Tensor:
    """y [T, D]: for every unit of x [T, D] the sum of weight * expert(e, x[t]) over its choices, copies included."""
    rows: list[list[Tensor]] = [[] for _ in range(x.shape[0])]
    for t, e, w in choices(plan, weight):
        if e < plan.num_experts:
            rows[t].append(w * expert(e, x[t]))
        elif isinstance(plan, Plan) and plan.virtual[e - plan.num_experts] == "copy":
            rows[t].append(w * x[t])
    return torch.stack([torch.stack(r).sum(0) if r else x[t] * 0 for t, r in enumerate(rows)])


def layer_oracle(layer: MoELayer, x: Tensor, signals: Signals, plan: AnyPlan) -> tuple[Tensor, MoELayer]:
    """y [T, D] in float64 with its graph, and the float64 copy of the layer that the graph leads to.

    The choices are those of `plan`; weights are computed anew in float64, from the same choices, by the copy's router.
    """
    exact = copy.deepcopy(layer).double()
    wide = x.double()
    given = Carry(own={"": Replay(plan)}) if isinstance(plan, Plan) else Carry()
    again, _ = exact.router(wide, signals.at("router"), given)
    if [row[:2] for row in choices(again)] != [row[:2] for row in choices(plan)]:
        raise AssertionError("oracle: selection in float64 differs from the plan")
    return mixture(again, wide, lambda e, unit: _expert(exact, e, unit)), exact


def _expert(layer: MoELayer, e: int, x: Tensor) -> Tensor:
    """Expert e of the layer's bank on one unit [D], from the bank's parameters alone."""
    bank = layer.experts
    if isinstance(bank, ModuleBank):
        return list(bank.children())[e](x[None])[0]
    if isinstance(bank, ClampedGatedBank):
        both, out = bank.gate_up.unbind(0)[e] @ x, torch.zeros((), dtype=x.dtype)
        if bank.gate_up_bias is not None and bank.down_bias is not None:
            both, out = both + bank.gate_up_bias.unbind(0)[e], bank.down_bias.unbind(0)[e]
        gate, up = both.chunk(2)
        gate, up = gate.clamp(max=bank.config.limit), up.clamp(-bank.config.limit, bank.config.limit)
        return bank.down.unbind(0)[e] @ (gate * torch.sigmoid(bank.config.alpha * gate) * (up + 1)) + out
    act = ACTIVATIONS[bank.config.activation]
    if isinstance(bank, GatedBank):
        if bank.widths is None:
            first, down = bank.gate_up.unbind(0)[e], bank.down.unbind(0)[e]
        else:
            first = bank.gate_up.split([2 * f for f in bank.widths])[e]
            down = bank.down.split(list(bank.widths))[e].t()
        gate, up = (first @ x).chunk(2)
        return down @ (act(gate) * up)
    if isinstance(bank, ExtendedBank):
        hidden, new = bank.up.unbind(0)[e] @ x, bank.new.unbind(0)[e] @ x + bank.new_bias.unbind(0)[e]
        if bank.up_bias is None or bank.down_bias is None:
            return bank.down.unbind(0)[e] @ (act(hidden) * new)
        hidden = hidden + bank.up_bias.unbind(0)[e]
        return bank.down.unbind(0)[e] @ (act(hidden) * new) + bank.down_bias.unbind(0)[e]
    if isinstance(bank, MLPBank):
        hidden = bank.up.unbind(0)[e] @ x
        if bank.up_bias is None or bank.down_bias is None:
            return bank.down.unbind(0)[e] @ act(hidden)
        return bank.down.unbind(0)[e] @ act(hidden + bank.up_bias.unbind(0)[e]) + bank.down_bias.unbind(0)[e]
    raise AssertionError(f"oracle: no reference for a bank of type {type(bank).__name__}")
