"""Attention experts: several attentions side by side, mixed by a router at the token that asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.carry import Carry
from ..core.plan import AnyPlan, Dense
from ..core.pytree import changed
from ..core.signals import Signals
from ..core.trail import Trail
from ..nn.attention import Attention
from ..ops.combine import table_weight
from ..ops.rows import rows
from . import config as cfg
from .layer import route
from .record import build_losses, note
from .routed import Routed
from .units import masked

__all__ = ["AttentionExperts", "into_experts", "per_expert"]


class AttentionExperts(Routed):
    """y_t = sum over experts j of a_j(x_t) * Attention_j(x)_t.

    `(x [B, S, D], signals, state, carry) -> (y [B, S, D], state, carry, trail)`. Every expert attends over all tokens
    with queries (and, unless they are shared, keys and values) of its own, whatever the router says; the gate is taken
    at the token that asks. With a router that takes all experts this is the soft mixture of attention; one that takes k
    leaves the others' gates at zero, at the same cost.

    The experts are the heads of one attention, N * H of them: of expert j the heads j*H to (j+1)*H. With shared keys
    and values, each of the H' groups holds its heads of expert 0, of expert 1 and so on: see `per_expert`.
    Source: 05, BAM (arXiv 2408.08274), soft mixture of attention.
    """

    role = "attention"
    threads = True  # takes and returns carry and trail

    def __init__(self, config: cfg.AttentionExperts, dim: int) -> None:
        super().__init__()
        self.config = config
        one = config.attention
        kv = one.num_kv_heads or one.num_heads
        N = config.num_experts
        whole = one.replace(
            num_heads=one.num_heads * N, num_kv_heads=kv if config.shared_kv else kv * N, head_dim=one.width(dim)
        )
        self.router = config.router.build(dim=dim, num_experts=N)
        self.attention: Attention = whole.build(dim)
        self.losses = build_losses(config.losses, "AttentionExperts.losses")

    def forward(
        self, x: Tensor, signals: Signals | None = None, state: Any = None, carry: Carry | None = None
    ) -> tuple[Tensor, Any, Carry, Trail]:
        signals = Signals() if signals is None else signals
        carry = Carry() if carry is None else carry
        seen = changed(signals, rows=x.shape[0])
        plan, carry = route(self.router, masked(x.flatten(0, 1), signals.valid), seen, carry)
        gate = self._gate(plan).view(*x.shape[:2], -1)
        y, state = self.attention(x, signals, state, gate=gate)
        return y, state, carry, note(plan, self.losses, signals, self.training, "AttentionExperts")

    def _gate(self, plan: AnyPlan) -> Tensor:
        """[T, heads]: the gate of each head's expert."""
        weight = plan.weight if isinstance(plan, Dense) else _dense(plan)
        one = self.config.attention
        groups = one.num_kv_heads or one.num_heads
        if not self.config.shared_kv:
            return weight.repeat_interleave(one.num_heads, dim=1)
        return weight.repeat_interleave(one.num_heads // groups, dim=1).repeat(1, groups)

    def new_state(self, capacity: int) -> Any:
        """An empty cache: keys and values of every expert, or the shared ones."""
        return self.attention.new_state(capacity)


def _dense(plan: AnyPlan) -> Tensor:
    """[T, N] weights of a plan that chooses some experts, zero for the others."""
    index = rows(plan)
    weight = table_weight(plan, index)
    place = index.unit * plan.num_experts + index.expert
    chosen = index.unit * weight.shape[1] + index.slot
    flat = weight.new_zeros(weight.shape[0] * plan.num_experts)
    return flat.index_copy(0, place, weight.reshape(-1).gather(0, chosen)).view(-1, plan.num_experts)


_BY_COLUMN = ("o.weight", "relative.table")  # parameters whose second axis counts heads


def per_expert(module: AttentionExperts, name: str, weight: Tensor) -> Tensor:
    """[N, ...]: a parameter of `module.attention` as one entry per expert, a view where memory allows it.

    name: q, k, v or o, "weight" or "bias" as in "q.weight", "sinks" or "relative.table"; shared keys and values have no
    entries per expert.
    """
    config = module.config
    one, N = config.attention, config.num_experts
    groups = one.num_kv_heads or one.num_heads
    axis = 1 if name in _BY_COLUMN else 0
    if config.shared_kv:
        if name[0] in "kv":
            raise ValueError(f"{name} is shared by all experts")
        parts = weight.unflatten(axis, (groups, N, -1)).movedim(axis + 1, 0)
        return parts.flatten(axis + 1, axis + 2)
    return weight.unflatten(axis, (N, -1)).movedim(axis, 0)


def into_experts(module: AttentionExperts, name: str, parts: list[Tensor]) -> Tensor:
    """The inverse of `per_expert`: one parameter of `module.attention` from those of N plain attentions."""
    config = module.config
    one = config.attention
    groups = one.num_kv_heads or one.num_heads
    axis = 1 if name in _BY_COLUMN else 0
    if not config.shared_kv:
        return torch.cat(parts, dim=axis)
    stacked = torch.stack([p.unflatten(axis, (groups, -1)) for p in parts], dim=axis + 1)
    return stacked.flatten(axis, axis + 2)
