"""Layers, tokens and plans that the tests of the routed layer share."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.carry import Carry, Live
from moestro.core.plan import AnyPlan, Dense, ExpertChoice, Plan
from moestro.experts import Gated
from moestro.losses.config import SwitchBalance, ZLoss
from moestro.moe import MoELayer
from moestro.routers import config as routers

D, E, B, S = 12, 8, 3, 6
T = B * S


def balance(router: routers.Router) -> tuple[Any, ...]:
    """A loss on what this router writes: balance has no meaning where loads are equal by construction."""
    equal = isinstance(router.select, routers.All | routers.ExpertChoiceSelect)
    return (ZLoss(),) if equal else (SwitchBalance(), ZLoss())


def build(**changes: Any) -> Any:
    torch.manual_seed(0)
    made = MoELayer(num_experts=E, experts=Gated(width=10)).replace(**changes).build(D)
    for p in made.parameters():
        if p.ndim > 1 and p.requires_grad:
            nn.init.normal_(p, std=0.4)
    return made


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(seed))


def plans() -> dict[str, AnyPlan]:
    """A plan of every type and shape, with leaf weights."""
    g = torch.Generator().manual_seed(2)
    score = torch.rand(T, E, generator=g)
    table = score.topk(3, dim=1).indices
    weight = torch.rand(T, 3, generator=g) + 0.1
    kept = torch.rand(T, 3, generator=g) < 0.7
    valid = torch.arange(T) % S < S - 2
    ragged = torch.where(torch.rand(T, 3, generator=g) < 0.6, table, -1)
    virtual = torch.stack([table[:, 0], torch.full((T,), E), torch.arange(T) % 2 + E + 1], 1)
    slots = score.t().topk(4, dim=1).indices[None]
    every = torch.rand(T, E, generator=g)
    return {
        "top-k": Plan(expert=table, weight=weight, num_experts=E, complete=True),
        "ragged": Plan(expert=ragged, weight=torch.where(ragged >= 0, weight, 0), num_experts=E),
        "dropped": Plan(expert=table, weight=torch.where(kept, weight, 0), kept=kept, num_experts=E, capacity=T),
        "padded": Plan(expert=table, weight=torch.where(valid[:, None], weight, 0), valid=valid, num_experts=E),
        "virtual": Plan(expert=virtual, weight=weight, num_experts=E, virtual=("null", "copy", "copy")),
        "one expert": Plan(expert=torch.zeros(T, 1, dtype=torch.int64), weight=weight[:, :1], num_experts=E),
        "experts choose": ExpertChoice(unit=slots, weight=torch.rand(1, E, 4, generator=g), num_units=T),
        "dense": Dense(weight=every),
        "dense padded": Dense(weight=torch.where(valid[:, None], every, 0), valid=valid),
    }


def live(plan: AnyPlan) -> tuple[Tensor, Carry]:
    weight = plan.weight.detach().clone().requires_grad_()
    return weight, Carry(own={"": Live(dataclasses.replace(plan.check(), weight=weight))})
