"""`check_experts` and `check_exchange`: what must hold for banks and for whatever carries rows to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.plan import Plan
from ..core.rows import Rows
from ..ops.combine import combine, gather_rows
from ..ops.rows import rows as derive_rows
from .compare import assert_close

__all__ = ["check_exchange", "check_experts", "plan_for"]


def plan_for(T: int, num_experts: int, top_k: int, *, starved: tuple[int, ...] = (), seed: int = 3) -> Plan:
    """A plan with random distinct choices and weights; experts in `starved` are never chosen."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(T, num_experts, generator=generator)
    score[:, list(starved)] = -1.0
    top_k = min(top_k, num_experts - len(starved))
    expert = score.topk(top_k, dim=1).indices
    weight = torch.rand(T, top_k, generator=generator) + 0.1
    return Plan(expert=expert, weight=weight, num_experts=num_experts, complete=True).check()


def check_experts(
    make: Callable[[], nn.Module],
    *,
    num_experts: int,
    unit: tuple[int, ...] = (16,),
    units: int = 24,
    top_k: int = 2,
    gradcheck: bool = True,
) -> None:
    """Run every check on fresh banks from `make()`.

    Each expert sees its own rows only; experts without rows get exact zero gradients, never None and never another's;
    no rows at all work; `weights=` replaces the bank's own parameters; gradients equal finite differences in float64;
    parameters are described; the state dict makes the round trip.
    """
    bank = make()
    x = torch.randn(units, *unit, generator=torch.Generator().manual_seed(5))
    _check_isolation(bank, x, num_experts, top_k)
    _check_starved(bank, x, num_experts, top_k)
    _check_no_rows(bank, x, num_experts)
    _check_weights_argument(bank, x, num_experts, top_k)
    _check_description(bank)
    _check_bank_round_trip(make, x, num_experts, top_k)
    if gradcheck:
        _check_finite_differences(bank, x[:5], num_experts)


def _run(bank: Any, x: Tensor, plan: Plan, **kwargs: Any) -> tuple[Tensor, Rows]:
    index = derive_rows(plan)
    return bank(gather_rows(x, index), index, **kwargs), index


def _check_isolation(bank: nn.Module, x: Tensor, num_experts: int, top_k: int) -> None:
    plan = plan_for(x.shape[0], num_experts, top_k)
    out, index = _run(bank, x, plan)
    for e in range(num_experts):
        a, b = int(index.offsets[e]), int(index.offsets[e + 1])
        if a == b:
            continue
        alone = Plan(
            expert=torch.full((b - a, 1), e), weight=torch.ones(b - a, 1), num_experts=num_experts, complete=True
        )
        own, _ = _run(bank, x[index.unit[a:b]], alone)
        assert_close(f"rows of expert {e} alone", own, out[a:b], tol=1e-5)


def _check_starved(bank: nn.Module, x: Tensor, num_experts: int, top_k: int) -> None:
    if num_experts < 2:
        return
    starved = (0, num_experts - 1) if num_experts > 2 else (0,)
    plan = plan_for(x.shape[0], num_experts, top_k, starved=starved)
    bank.zero_grad(set_to_none=True)
    out, index = _run(bank, x, plan)
    out.square().sum().backward()
    for name, p in bank.named_parameters():
        if p.requires_grad and p.grad is None:
            raise AssertionError(f"starved experts: {name} has no gradient; with FSDP or DDP that hangs or misleads")
    whole = {n: p.grad.clone() for n, p in bank.named_parameters() if p.grad is not None}
    # The gradient of everything must be that of the fed experts' rows, computed one expert at a time.
    total = {n: torch.zeros_like(g) for n, g in whole.items()}
    for e in range(num_experts):
        a, b = int(index.offsets[e]), int(index.offsets[e + 1])
        if a == b:
            continue
        bank.zero_grad(set_to_none=True)
        alone = Plan(
            expert=torch.full((b - a, 1), e), weight=torch.ones(b - a, 1), num_experts=num_experts, complete=True
        )
        own, _ = _run(bank, x[index.unit[a:b]], alone)
        own.square().sum().backward()
        for n, p in bank.named_parameters():
            if p.grad is not None:
                total[n] += p.grad
    for n, g in whole.items():
        assert_close(f"gradient of {n} with starved experts", g, total[n], tol=1e-4)
    for name, info in _described(bank).items():
        if info.expert_axis is not None and name in whole:
            for e in starved:
                if bool(whole[name].select(info.expert_axis, e).any()):
                    raise AssertionError(
                        f"starved experts: expert {e} received no row but {name} has a gradient for it"
                    )
    bank.zero_grad(set_to_none=True)


def _check_no_rows(bank: nn.Module, x: Tensor, num_experts: int) -> None:
    plan = Plan(
        expert=torch.full((x.shape[0], 1), -1), weight=torch.zeros(x.shape[0], 1), num_experts=num_experts
    ).check()
    bank.zero_grad(set_to_none=True)
    out, _ = _run(bank, x.requires_grad_(), plan)
    if out.shape[0] != 0:
        raise AssertionError(f"no rows: {out.shape[0]} rows came out")
    out.sum().backward()
    for name, p in bank.named_parameters():
        if p.requires_grad and (p.grad is None or bool(p.grad.any())):
            raise AssertionError(f"no rows: the gradient of {name} must be zeros, not None and not something")
    bank.zero_grad(set_to_none=True)
    x.requires_grad_(False)


def _check_weights_argument(bank: nn.Module, x: Tensor, num_experts: int, top_k: int) -> None:
    plan = plan_for(x.shape[0], num_experts, top_k)
    out, _ = _run(bank, x, plan)
    own = {n: p.detach().clone() for n, p in bank.named_parameters()}
    other = copy.deepcopy(bank)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    substituted, _ = _run(other, x, plan, weights=own)
    assert_close("weights= in place of the bank's own", substituted, out, tol=1e-6)


def _described(bank: nn.Module) -> dict[str, Any]:
    from ..core.params import describe

    return describe(bank)


def _check_description(bank: nn.Module) -> None:
    for name, info in _described(bank).items():
        if info.role not in ("expert", "shared_expert"):
            raise AssertionError(f"description: {name} has the role {info.role!r}, not 'expert'")


def _check_bank_round_trip(make: Callable[[], nn.Module], x: Tensor, num_experts: int, top_k: int) -> None:
    bank, other = make(), make()
    with torch.no_grad():
        for i, p in enumerate(bank.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    other.load_state_dict(bank.state_dict())
    plan = plan_for(x.shape[0], num_experts, top_k)
    assert_close("round trip through state_dict", _run(other, x, plan)[0], _run(bank, x, plan)[0], tol=0.0)


def _check_finite_differences(bank: nn.Module, x: Tensor, num_experts: int) -> None:
    exact = copy.deepcopy(bank).double()
    with torch.no_grad():
        for i, p in enumerate(exact.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) * 0.3)
    plan = plan_for(x.shape[0], num_experts, 2, starved=(0,) if num_experts > 1 else ())
    names = [n for n, _ in exact.named_parameters()]

    def apply(x: Tensor, *values: Tensor) -> Tensor:
        return _run(exact, x, plan, weights=dict(zip(names, values)))[0]

    inputs = [x.double().requires_grad_(), *[p.detach().clone().requires_grad_() for p in exact.parameters()]]
    torch.autograd.gradcheck(apply, inputs, fast_mode=True)


def check_exchange(
    make: Callable[[nn.Module], Any],
    bank: nn.Module,
    *,
    num_experts: int,
    dim: int = 16,
    units: int = 24,
    top_k: int = 2,
    capacity: int | None = None,
    tol: float = 1e-6,
) -> None:
    """The exchange around `bank` gives the bank's own y and gradients, also with starved experts and with no rows."""
    import dataclasses

    exchange = make(bank)
    for starved in ((), (0,) if num_experts > 1 else ()):
        plan = dataclasses.replace(plan_for(units, num_experts, top_k, starved=starved), capacity=capacity)
        plan.check()
        x = torch.randn(units, dim, generator=torch.Generator().manual_seed(6))
        results = []
        for part in (bank, exchange):
            bank.zero_grad(set_to_none=True)
            leaf = x.clone().requires_grad_()
            if part is exchange:
                exchange.prepare(plan)
            out, index = _run(part, leaf, plan)
            y = combine(out, plan.weight, index)
            y.square().sum().backward()
            assert leaf.grad is not None
            results.append((y.detach(), leaf.grad, [p.grad.clone() for p in bank.parameters() if p.grad is not None]))
        (y0, dx0, dw0), (y1, dx1, dw1) = results
        assert_close("y through the exchange", y1, y0, tol=tol)
        assert_close("gradient of x through the exchange", dx1, dx0, tol=10 * tol)
        for i, (a, b) in enumerate(zip(dw1, dw0, strict=True)):
            assert_close(f"gradient of parameter {i} through the exchange", a, b, tol=10 * tol)
    bank.zero_grad(set_to_none=True)
