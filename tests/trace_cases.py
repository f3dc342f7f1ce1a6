"""Trails made by hand for the trace tests."""

from __future__ import annotations

import torch

from moestro.core.plan import Plan, demand, load
from moestro.core.trail import Key, Record, Trail


def plan(expert, num_experts=4, **fields):
    expert = torch.as_tensor(expert)
    weight = (expert >= 0).float() / expert.shape[1]
    if fields.get("kept") is not None:
        weight = weight * fields["kept"]
    return Plan(expert=expert, weight=weight, num_experts=num_experts, **fields)


def record(made, **fields):
    d, r = demand(made), load(made)
    return Record(plan=made, demand=d, load=r, dropped=(d - r).sum(), **fields)


def trail(plans, pass_=0):
    return Trail({Key(path, pass_): record(p) for path, p in plans.items()})


def random_trail(seed, units=50, experts=(4, 6), k=2, **fields):
    gen = torch.Generator().manual_seed(seed)
    plans = {}
    for i, E in enumerate(experts):
        probs = torch.rand(units, E, generator=gen).softmax(-1)
        plans[f"blocks.{i}.ffn"] = plan(torch.topk(probs, k).indices, E, probs=probs, **fields)
    return trail(plans)
