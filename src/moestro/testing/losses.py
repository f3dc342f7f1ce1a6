"""`check_loss`: what must hold for a loss on plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.plan import Plan
from ..core.stats import Stats

__all__ = ["check_loss", "check_total", "scored_plan"]


def scored_plan(
    T: int = 24,
    num_experts: int = 4,
    top_k: int = 2,
    *,
    seed: int = 0,
    padding: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Plan, Tensor]:
    """A top-k plan from random logits that need a gradient, and those logits. The last `padding` units are invalid.

    `extra` holds what noisy routers leave: noisy_logits and noise_std, [T, E].
    """
    logits = torch.randn(T, num_experts, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()
    valid = torch.arange(T) < T - padding
    probs = logits.softmax(-1)
    expert = torch.where(valid[:, None], probs.topk(top_k, dim=1).indices, -1)
    weight = torch.gather(probs, 1, expert.clamp_min(0)) * valid[:, None]
    plan = Plan(
        expert=expert,
        weight=weight,
        num_experts=num_experts,
        probs=probs,
        logits=logits,
        valid=valid if padding else None,
        extra=_noise(logits, seed),
        complete=not padding,
    )
    return plan.check(), logits


def _noise(logits: Tensor, seed: int) -> dict[str, Tensor]:
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed + 100), dtype=logits.dtype)
    std = torch.full_like(logits.detach(), 0.5)
    return {"noisy_logits": logits + noise * std, "noise_std": std}


def _number(value: Tensor) -> float:
    return float(value.detach())


def _rows(plan: Plan, part: slice) -> Plan:
    cut: dict[str, Any] = {
        n: getattr(plan, n)[part]
        for n in ("expert", "weight", "probs", "logits", "valid")
        if getattr(plan, n) is not None
    }
    return dataclasses.replace(plan, extra={n: t[part] for n, t in plan.extra.items()}, **cut)


def check_loss(loss: Any, tensors: Mapping[str, Tensor] | None = None, *, needs_gradient: bool = True) -> None:
    """In the graph, not constant, additive over parts (value and gradient), and blind to padding.

    tensors: what the loss needs besides the plan, [24] each (segment, task, ...), for the plan of `scored_plan()`.
    Parts are cut at unit 12, which must be a border of segments.
    """
    tensors = dict(tensors or {})
    plan, logits = scored_plan()
    value = loss(plan, **tensors)
    if value.ndim != 0 or not bool(torch.isfinite(value)):
        raise AssertionError(f"{loss.name}: the value must be one finite number")
    if needs_gradient:
        if not value.requires_grad:
            raise AssertionError(f"{loss.name}: the value is not in the graph; its coefficient could do nothing")
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        if not bool(gradient.abs().sum() > 0):
            raise AssertionError(f"{loss.name}: the gradient is zero; the loss is constant for the router")
    other, _ = scored_plan(seed=1)
    if _number(loss(other, **tensors)) == _number(value):
        raise AssertionError(f"{loss.name}: two different plans have exactly the same value")
    _check_additive(loss, plan, logits, tensors, value)
    _check_blind_to_padding(loss, tensors)


def _check_additive(loss: Any, plan: Plan, logits: Tensor, tensors: dict[str, Tensor], value: Tensor) -> None:
    parts: list[Stats] = []
    for cut in (slice(0, 12), slice(12, 24)):
        parts.append(loss.stats(_rows(plan, cut), **{n: t[cut] for n, t in tensors.items()}))
    total = parts[0] + parts[1]
    pooled = loss.value(total)
    if abs(_number(pooled - value)) > 1e-9 * max(1.0, abs(_number(value))):
        raise AssertionError(f"{loss.name}: the sum of two halves gives {_number(pooled)}, the whole {_number(value)}")
    if value.requires_grad:
        (want,) = torch.autograd.grad(value, logits, retain_graph=True)
        got = torch.zeros_like(want)
        for part in parts:
            got += torch.autograd.grad(loss.value(part.within(total)), logits, retain_graph=True)[0]
        if float((got - want).norm()) > 1e-9 * _number(want.norm()):
            raise AssertionError(f"{loss.name}: gradients of the parts do not add up to the gradient of the whole")


def _check_blind_to_padding(loss: Any, tensors: dict[str, Tensor]) -> None:
    plan, _ = scored_plan(padding=6)
    assert plan.probs is not None
    assert plan.logits is not None
    loud = dataclasses.replace(
        plan,
        logits=torch.cat([plan.logits[:18], plan.logits[18:] * 10 + 3]),
        probs=torch.cat([plan.probs[:18], plan.probs[18:].flip(1)]),
        extra={n: torch.cat([t[:18], t[18:].flip(1) + 1]) for n, t in plan.extra.items()},
    )
    cut = _rows(plan, slice(0, 18))
    short = dataclasses.replace(cut, valid=None)
    a = loss(plan, **tensors)
    b = loss(loud, **tensors)
    c = loss(short, **{n: t[:18] for n, t in tensors.items()})
    for other, what in ((b, "the content of padding"), (c, "the presence of padding")):
        if abs(_number(a - other)) > 1e-9 * max(1.0, abs(_number(a))):
            raise AssertionError(f"{loss.name}: {what} changes the value from {_number(other)} to {_number(a)}")


def check_total(total: Callable[[list[Plan]], Tensor], collapsed: float) -> None:
    """A balance loss over two layers, each collapsed on another expert, must not look balanced.

    total: plans of the layers -> the total. collapsed: its value for one collapsed layer.
    """
    plans = []
    for e in (0, 1):
        probs = torch.nn.functional.one_hot(torch.full((8,), e), 2).double()
        plans.append(
            Plan(
                expert=torch.full((8, 1), e),
                weight=torch.ones(8, 1, dtype=torch.float64),
                num_experts=2,
                probs=probs,
                logits=probs * 20,
                complete=True,
            )
        )
    got = _number(total(plans))
    if abs(got - 2 * collapsed) > 1e-6:
        raise AssertionError(
            f"two layers collapsed onto different experts give {got:.4g}, not {2 * collapsed:.4g}: layers were pooled"
        )
