"""Plans and comparisons that the tests of several operations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moestro.core.plan import AnyPlan, Dense, ExpertChoice, Plan
from moestro.testing.compare import assert_close


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed))


def topk_plan(T: int = 23, K: int = 2, E: int = 6, used: int | None = None, seed: int = 0) -> Plan:
    """Distinct experts per unit, the last ones idle where `used` < E."""
    expert = torch.topk(rand(T, used or E, seed=seed), K, dim=1).indices
    return Plan(expert=expert, weight=rand(T, K, seed=seed + 1), num_experts=E, complete=True)


def ragged_plan(T: int = 23, K: int = 3, E: int = 6, seed: int = 0) -> Plan:
    """Repeated, absent, virtual, dropped and padded choices, all at once."""
    g = generator(seed)
    plan = Plan(
        expert=torch.randint(-1, E + 2, (T, K), generator=g),
        weight=torch.rand(T, K, generator=g),
        num_experts=E,
        kept=torch.rand(T, K, generator=g) > 0.2,
        valid=torch.rand(T, generator=g) > 0.2,
        virtual=("null", "copy"),
        capacity=T * K,
    )
    silent = ~(plan.active() & plan.kept)
    return Plan(**{**vars(plan), "weight": plan.weight.masked_fill(silent, 0)})


def choosing_plan(T: int = 23, E: int = 6, C: int = 5, G: int = 2, seed: int = 0) -> ExpertChoice:
    """Experts choose units, some twice; empty slots; padding."""
    g = generator(seed)
    plan = ExpertChoice(
        unit=torch.randint(-1, T, (G, E, C), generator=g),
        weight=torch.rand(G, E, C, generator=g),
        num_units=T,
        valid=torch.rand(T, generator=g) > 0.2,
    )
    return ExpertChoice(**{**vars(plan), "weight": plan.weight.masked_fill(~plan.routed(), 0)})


def dense_plan(T: int = 23, E: int = 4, padded: bool = True, seed: int = 0) -> Dense:
    valid = rand(T, seed=seed) > 0.2 if padded else None
    weight = rand(T, E, seed=seed + 1)
    return Dense(weight=weight if valid is None else weight * valid[:, None], valid=valid)


def every_plan() -> dict[str, AnyPlan]:
    """One plan per kind and per corner."""
    nobody = torch.full((5, 2), -1)
    return {
        "top2": topk_plan(),
        "top1": topk_plan(K=1),
        "idle experts": topk_plan(E=9, used=4),
        "one expert": topk_plan(K=1, E=1),
        "one unit": topk_plan(T=1),
        "no units": topk_plan(T=0),
        "ragged": ragged_plan(),
        "no rows": Plan(expert=nobody, weight=torch.zeros(5, 2), num_experts=3),
        "expert choice": choosing_plan(),
        "expert choice, nothing chosen": ExpertChoice(
            unit=torch.full((1, 3, 2), -1), weight=torch.zeros(1, 3, 2), num_units=4
        ),
        "dense": dense_plan(padded=False),
        "dense, padded": dense_plan(),
    }


def bounds(*counts: int) -> Tensor:
    """Offsets of experts with that many rows each."""
    return torch.tensor([0, *counts]).cumsum(0)


def compare(
    names: Sequence[str],
    got: Callable[..., Tensor],
    want: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tol: float = 1e-5,
    expanded: bool = False,
) -> None:
    """Compare values and all gradients of a function with those of its oracle, which is given float64 copies."""
    mine = [t.detach().clone().requires_grad_() for t in inputs]
    theirs = [t.detach().double().requires_grad_() for t in inputs]
    a, b = got(*mine), want(*theirs)
    assert_close("output", a, b, tol)
    weights = randn(*b.shape, seed=99, dtype=torch.float64)
    for y in (a, b):
        if not y.requires_grad:  # an oracle without rows is a constant
            assert y is b
        elif expanded:
            y.sum().backward()
        else:
            y.backward(weights.to(y.dtype))
    for name, x, y in zip(names, mine, theirs, strict=True):
        assert x.grad is None or x.grad.dtype == x.dtype
        # What autograd leaves out in the oracle is a gradient of zero.
        assert_close(f"gradient of {name}", x.grad, torch.zeros_like(y) if y.grad is None else y.grad, tol)


def twice(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Two runs give the same bits, in values and gradients."""

    def run() -> list[Any]:
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = function(*leaves)
        out.backward(randn(*out.shape, seed=5).to(out.dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
