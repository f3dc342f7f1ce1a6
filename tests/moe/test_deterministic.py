"""Layers whose units come out bitwise equal alone and in any batch."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import UserError
from moestro.experts.config import MLP, Experts, Gated
from moestro.moe.config import GateMerge, MoELayer
from moestro.ops import native
from moestro.routers.config import Constant, Linear, Raw, Renormalised, Router, SoftmaxKept, TopK, TopP, Weigh

D = 40
needs_kernels = pytest.mark.skipif(native.load() is None, reason=f"no CPU kernels: {native.reason()}")
BANKS: dict[str, Experts] = {
    "gated": Gated(width=24, deterministic=True),
    "widths": Gated(width=(8, 30, 17, 24, 5, 64), deterministic=True),
    "mlp": MLP(width=36, bias=True, deterministic=True),
}
WEIGHTS: dict[str, Weigh] = {"renormalised": Renormalised(), "kept": SoftmaxKept(), "raw": Raw(), "equal": Constant()}


def build(experts: Experts, weigh: Weigh, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    router = Router(score=Linear(bias=True, deterministic=True), select=TopK(k=3), weigh=weigh)
    config = MoELayer(num_experts=6, router=router, experts=experts, **more)  # type: ignore[arg-type]
    return config.build(dim=D)


@needs_kernels
@pytest.mark.parametrize("weigh", WEIGHTS)
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("training", [False, True])
def test_units_do_not_depend_on_their_batch(bank: str, weigh: str, training: bool) -> None:
    layer = build(BANKS[bank], WEIGHTS[weigh]).train(training)
    x = torch.randn(70, D)
    with torch.set_grad_enabled(training):
        y = layer(x)[0]
        for part in (slice(0, 1), slice(5, 9), slice(30, 70)):
            assert torch.equal(layer(x[part])[0], y[part])


@needs_kernels
def test_with_a_shared_expert_and_a_ragged_router() -> None:
    torch.manual_seed(0)
    router = Router(score=Linear(deterministic=True), select=TopP(p=0.4), weigh=Renormalised())
    shared = Gated(width=16, deterministic=True)
    layer = MoELayer(num_experts=6, router=router, experts=BANKS["gated"], shared=shared).build(dim=D).eval()
    x = torch.randn(70, D)
    with torch.no_grad():
        y = layer(x)[0]
        for part in (slice(0, 1), slice(5, 9), slice(30, 70)):
            assert torch.equal(layer(x[part])[0], y[part])


@needs_kernels
def test_the_gradient_of_a_unit_does_not_depend_on_its_batch_either() -> None:
    layer = build(BANKS["gated"], Renormalised()).train()

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        layer(x)[0].sum().backward()
        assert x.grad is not None
        return x.grad

    x = torch.randn(70, D)
    whole = gradient(x)
    for part in (slice(0, 1), slice(30, 70)):
        assert torch.equal(gradient(x[part]), whole[part])


@needs_kernels
def test_without_it_nobody_promises() -> None:
    """The plain layer differs somewhere, so the tests above can fail."""
    torch.manual_seed(0)
    layer = MoELayer(num_experts=6, router=Router(select=TopK(k=3)), experts=Gated(width=24)).build(dim=D).eval()
    x = torch.randn(70, D)
    with torch.no_grad():
        y = layer(x)[0]
        assert any(not torch.equal(layer(x[i : i + 1])[0], y[i : i + 1]) for i in range(70))


def test_where_it_cannot_be_had_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "reason", lambda: "no compiler was found")
    with pytest.raises(UserError, match="no compiler was found"):
        build(BANKS["gated"], Raw())(torch.randn(3, D))
    with pytest.raises(UserError, match="no compiler was found"):
        BANKS["gated"].build(dim=D, num_experts=6).mixture(torch.randn(3, D), _plan())


def test_a_gated_merge_is_refused() -> None:
    with pytest.raises(UserError, match="gated merge"):
        MoELayer(shared=Gated(width=4, deterministic=True), merge=GateMerge()).build(dim=D)


def _plan() -> object:
    from moestro.core.plan import Plan

    return Plan(expert=torch.tensor([[0, 1]] * 3), weight=torch.ones(3, 2), num_experts=6, complete=True)
