"""What the router tests share: signals that satisfy every router, exact probabilities, and comparison of plans."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moestro.core.plan import AnyPlan, Dense, ExpertChoice, Plan
from moestro.core.signals import Signals
from moestro.routers import Router, examples
from moestro.routers.router import StepRouter
from moestro.testing.attend import Map, causal_map

DIM, E = 16, 8
EXAMPLES = examples()


def build(config: Router | str, dim: int = DIM, num_experts: int = E, seed: int = 0) -> StepRouter:
    """A router with random, not tiny parameters, so that probabilities differ and noise matters."""
    config = EXAMPLES[config] if isinstance(config, str) else config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        router = config.build(dim=dim, num_experts=num_experts)
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.normal_(std=0.3)
    return router


def exact(config: Router, num_experts: int) -> StepRouter:
    """A router whose logits are its input: W is the identity."""
    ids = (num_experts if config.subset is None else len(config.subset)) + len(config.virtual)
    router = config.build(dim=ids, num_experts=num_experts)
    with torch.no_grad():
        router.score.weight.copy_(torch.eye(ids))  # type: ignore[union-attr,operator]
    return router


def units(T: int, dim: int = DIM, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def signals(T: int, per_segment: int = 8, **more: object) -> Signals:
    n = torch.arange(T)
    given: dict[str, Any] = {
        "segment": n // per_segment,
        "position": n % per_segment,
        "label": n * 3 % E,
        "task": n * 5 % E,
        "unit_id": n,
        "seed": 1234,
        **more,
    }
    if T <= 1024:  # the map has T x T entries; nobody looks at it in statistics over many units
        given.setdefault("attend", causal_map(given["segment"], given.get("valid")))
    return Signals(**given)  # type: ignore[arg-type]


def take(given: Signals, index: Tensor) -> Signals:
    """The signals of some of the units."""
    per_unit = ("valid", "position", "segment", "label", "task", "unit_id")
    cut = {n: t[index] for n in per_unit if (t := getattr(given, n)) is not None}
    assert isinstance(given.attend, Map)
    return dataclasses.replace(given, **cut, attend=given.attend.take(index))


def weights(plan: AnyPlan, num_experts: int = E) -> Tensor:
    """[T, ids] combine weight of every id for every unit, whatever the type of plan; differentiable."""
    if isinstance(plan, Dense):
        return plan.weight
    if isinstance(plan, Plan):
        ids = num_experts + len(plan.virtual)
        to = torch.where(plan.expert >= 0, plan.expert, ids)
        return plan.weight.new_zeros(to.shape[0], ids + 1).scatter_add(1, to, plan.weight)[:, :ids]
    G, n, C = plan.unit.shape
    unit = torch.where(plan.unit >= 0, plan.unit, plan.num_units)
    row = unit.transpose(0, 1).reshape(n, G * C)
    value = plan.weight.transpose(0, 1).reshape(n, G * C)
    return value.new_zeros(n, plan.num_units + 1).scatter_add(1, row, value)[:, : plan.num_units].t()


def rows(plan: AnyPlan) -> Tensor:
    """[T, ids] bool: which unit becomes a row of which expert (virtual ids included)."""
    if isinstance(plan, Dense):
        return plan.routed()
    if isinstance(plan, Plan):
        ids = plan.num_experts + len(plan.virtual)
        on = plan.active() if plan.kept is None else plan.active() & plan.kept
        to = torch.where(on, plan.expert, ids)
        return torch.zeros(to.shape[0], ids + 1, dtype=torch.bool).scatter(1, to, True)[:, :ids]
    met = torch.zeros(plan.num_units + 1, plan.num_experts, dtype=torch.bool)
    for e in range(plan.num_experts):
        met[plan.unit[:, e].reshape(-1), e] = True
    return met[:-1]


def decision(plan: AnyPlan) -> list[Tensor]:
    if isinstance(plan, Plan):
        return [plan.expert] if plan.kept is None else [plan.expert, plan.kept]
    return [plan.unit] if isinstance(plan, ExpertChoice) else []


def same_decision(a: AnyPlan, b: AnyPlan) -> bool:
    return all(torch.equal(s, t) for s, t in zip(decision(a), decision(b), strict=True))


def log(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits whose softmax is given."""
    return torch.tensor(rows, dtype=torch.float64).log().to(dtype)
