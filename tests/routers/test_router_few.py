"""The router of few units in one call equals its steps; whatever the call does not know, the steps do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.carry import Carry, Replay
from moestro.core.plan import Plan
from moestro.core.signals import Signals
from moestro.ops.native import load
from moestro.routers import Linear, Raw, Renormalised, Router, SoftmaxKept, TopK, examples
from moestro.routers.few import of_few
from moestro.routers.router import StepRouter
from moestro.testing.compare import assert_close
from ops.native_cases import compiles

D = 24


def units(T: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def by_steps(router: StepRouter, *args: object) -> Plan:
    known, router.common = router.common, None
    plan = router(*args)[0]
    router.common = known
    return plan


def in_one_call(router: StepRouter, x: Tensor, signals: Signals | None = None) -> Plan | None:
    return None if router.common is None else of_few(router, router.common, x, signals or Signals())


def assert_same(got: Plan, want: Plan) -> None:
    for field in dataclasses.fields(Plan):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if isinstance(b, Tensor) and b.is_floating_point():
            assert_close(field.name, a, b, 1e-6)
        else:
            assert torch.equal(a, b) if isinstance(b, Tensor) else a == b, field.name


@compiles
@pytest.mark.parametrize(
    "weigh", [Raw(scale=1.5), Renormalised(), SoftmaxKept(scale=2.0)], ids=lambda w: type(w).__name__
)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "identity"])
@pytest.mark.parametrize(("E", "k"), [(2, 2), (9, 2), (32, 4), (64, 8)])
def test_one_call_equals_the_steps(E: int, k: int, activation: Any, weigh: Raw | Renormalised | SoftmaxKept) -> None:
    kinds: list[Any] = [(), ("null", "copy")]
    for virtual in kinds:
        config = Router(
            score=Linear(bias=E == 9), activation=activation, select=TopK(k=k), weigh=weigh, virtual=virtual
        )  # type: ignore[arg-type]
        router = config.build(dim=D, num_experts=E)
        with torch.no_grad():
            for T in (1, 4):
                signals = Signals(label=torch.arange(T))
                made = in_one_call(router, units(T), signals)
                assert made is not None
                assert_same(made.check(), by_steps(router, units(T), signals))
                assert torch.equal(router(units(T), signals)[0].weight, made.weight), "it is what the router uses"


@compiles
def test_equal_units_and_nan() -> None:
    router = Router(select=TopK(k=3)).build(dim=D, num_experts=8)
    with torch.no_grad():
        router.score.weight[2:6] = router.score.weight[2]
        for row in units(20).split(1):
            made = in_one_call(router, row)
            assert made is not None
            assert_same(made, by_steps(router, row))
        for bad in (float("nan"), float("inf")):
            x = units(1).index_fill(1, torch.tensor([3]), bad)
            assert in_one_call(router, x) is None
            assert torch.equal(router(x)[0].expert, by_steps(router, x).expert)


def test_steps_are_asked_where_more_is_wanted() -> None:
    router = Router(select=TopK(k=2)).build(dim=D, num_experts=8)
    x = units(2)
    assert in_one_call(router, x) is None, "a gradient"
    assert router(x)[0].weight.requires_grad
    with torch.no_grad():
        assert (in_one_call(router, x) is not None) == (load() is not None)
        assert in_one_call(router, x, Signals(valid=torch.tensor([True, False]))) is None
        assert in_one_call(router, x, Signals(knobs={"top_k": 1})) is None
        assert router(x, Signals(knobs={"top_k": 1}))[0].expert.shape == (2, 1)
        assert in_one_call(router, units(99)) is None
        assert in_one_call(router, x.double()) is None
        given = Plan(expert=torch.tensor([[7, 0], [1, 2]]), weight=torch.ones(2, 2), num_experts=8)
        assert torch.equal(router(x, Signals(), Carry().keep(Replay(given)))[0].expert, given.expert)
        seen: list[str] = []
        router.select.register_forward_hook(lambda *_: seen.append("select"))
        router(x)
        assert seen == ["select"], "a watched step runs"


@pytest.mark.parametrize("name", examples())
def test_only_the_common_router_has_one_call(name: str) -> None:
    config = examples()[name]
    router = config.build(dim=D, num_experts=8)
    if getattr(router, "common", None) is not None:
        assert isinstance(config, Router)
        assert config.limit is None
        assert config.mix is None
        assert config.subset is None
        assert type(config.score) is Linear
        assert type(config.select) is TopK
