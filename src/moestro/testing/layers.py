"""`check_layer`: what must hold for every combination of router, bank and exchange."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..core.params import describe
from ..core.signals import Signals
from .compare import assert_close
from .oracle import layer_oracle
from .routers import signals_for

__all__ = ["check_layer"]


def check_layer(config: Any, *, dim: int = 8, batch: int = 2, length: int = 6, steps: int = 20) -> None:
    """Build the layer and compare it with the float64 oracle, then check what training it needs.

    Output and every gradient within 1e-5 (relative L2 per tensor) of the oracle, which is given the plan; finite loss;
    a router that receives gradient; causality where claimed; padding invariance; save and load; a loss that falls.
    """
    layer = config.build(dim=dim)
    _initialise(layer)
    x = _input(batch * length, dim)
    signals = signals_for(batch, length)
    _check_oracle(layer, x, signals)
    _check_router_gradient(layer, x, signals)
    _check_padding(layer, x, batch, length)
    if layer.causal:
        _check_causality(layer, x, signals, length)
    _check_round_trip(config, layer, x, signals)
    _check_learning(layer, x, signals, steps)


def _initialise(layer: Any) -> None:
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.4)


def _input(T: int, dim: int) -> Tensor:
    return torch.randn(T, dim, generator=torch.Generator().manual_seed(20))


def _check_oracle(layer: Any, x: Tensor, signals: Signals) -> None:
    leaf = x.clone().requires_grad_()
    y, _, trail = layer(leaf, signals)
    (plan,) = trail.plans().values()
    target = torch.sin(torch.arange(y.numel())).reshape(y.shape)
    wide = x.double().requires_grad_()
    want, exact = layer_oracle(layer, wide, signals, plan)
    assert_close("y", y, want, tol=1e-5)
    (y * target).sum().backward()
    (want * target.double()).sum().backward()
    assert wide.grad is not None
    assert_close("gradient of x", leaf.grad, wide.grad, tol=1e-5)
    _compare_gradients(dict(layer.named_parameters()), dict(exact.named_parameters()))
    layer.zero_grad(set_to_none=True)


def _compare_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Tensor by tensor. A scalar is compared together with all the others: its gradient is one difference of sums, so
    its own relative error says how close that difference is to zero and nothing about the gradient."""
    all_got, all_want = [], []
    for name, p in got.items():
        reference = want[name].grad
        if reference is None:
            reference = torch.zeros_like(want[name])
        if p.grad is None and (not p.requires_grad or name.startswith("router.")) and not bool(reference.any()):
            continue
        if p.numel() > 1:
            assert_close(f"gradient of {name}", p.grad, reference, tol=1e-5)
        if p.grad is not None:
            all_got.append(p.grad.flatten())
            all_want.append(reference.flatten())
    assert_close("gradient of all parameters", torch.cat(all_got), torch.cat(all_want), tol=1e-5)


def _loss(layer: Any, x: Tensor, signals: Signals) -> Tensor:
    y, _, trail = layer(x, signals)
    target = torch.sin(torch.arange(y.numel())).reshape(y.shape)
    return (y - target).square().mean() + trail.loss()


def _check_router_gradient(layer: Any, x: Tensor, signals: Signals) -> None:
    loss = _loss(layer, x, signals)
    if not bool(torch.isfinite(loss.detach())):
        raise AssertionError(f"loss: {float(loss.detach())}")
    loss.backward()
    roles = describe(layer)
    routed = [p for n, p in layer.named_parameters() if roles[n].role == "router" and p.requires_grad]
    if routed and not any(p.grad is not None and bool(p.grad.any()) for p in routed):
        raise AssertionError("gradient: no parameter of the router receives any")
    for name, p in layer.named_parameters():
        if p.grad is None and p.requires_grad and roles[name].role != "router":
            raise AssertionError(f"gradient: {name} received none")
        if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
            raise AssertionError(f"gradient: {name} received a NaN or an infinity")
    layer.zero_grad(set_to_none=True)


def _check_padding(layer: Any, x: Tensor, batch: int, length: int) -> None:
    signals = signals_for(batch, length, padding=2)
    assert signals.valid is not None
    with torch.no_grad():
        y = layer(x, signals)[0]
        loud = layer(torch.where(signals.valid[:, None], x, 30.0), signals)[0]
    assert_close("padding: output of valid units", loud[signals.valid], y[signals.valid], tol=1e-6)
    if bool(y[~signals.valid].any()):
        raise AssertionError("padding: the output of padding is not zero")


def _check_causality(layer: Any, x: Tensor, signals: Signals, length: int) -> None:
    T = x.shape[0]
    for training in (True, False):
        layer.train(training)
        with torch.no_grad():
            before = layer(x, signals)[0]
            for t in (1, length - 1):
                late = torch.arange(T) >= T - length + t
                after = layer(torch.where(late[:, None], -x.flip(0), x), signals)[0]
                mode = "training" if training else "evaluation"
                assert_close(f"causality in {mode}, change at {t}", after[~late], before[~late], tol=1e-6)
    layer.train()


def _check_round_trip(config: Any, layer: Any, x: Tensor, signals: Signals) -> None:
    other = type(config).from_dict(config.to_dict()).build(dim=x.shape[1])
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert_close("save and load", other(x, signals)[0], layer(x, signals)[0], tol=0.0)


def _check_learning(layer: Any, x: Tensor, signals: Signals, steps: int) -> None:
    layer = copy.deepcopy(layer)
    optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=2e-2)
    first = float(_loss(layer, x, signals).detach())
    for _ in range(steps):
        optimiser.zero_grad(set_to_none=True)
        _loss(layer, x, signals).backward()
        optimiser.step()
    last = float(_loss(layer, x, signals).detach())
    if not last < 0.95 * first:
        raise AssertionError(f"learning: the loss went from {first:.3f} to {last:.3f} in {steps} steps")
