"""The compiled kernels of routed experts where sizes exceed their blocks, for each instruction set and any threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.plan import Plan
from moestro.experts.config import Gated
from moestro.ops import native as kernels
from moestro.ops.expert_mlp import ACTIVATIONS, by_expert, native
from moestro.ops.expert_mlp.problem import Grads, Problem, Wanted
from moestro.ops.rows import rows
from moestro.testing.compare import assert_close
from ops import expert_cases
from ops.kernel_cases import levels, loader
from ops.ops_cases import generator, randn

pytestmark = pytest.mark.skipif(kernels.load() is None, reason=f"no CPU kernels: {kernels.reason()}")
ALL = Wanted(True, True, True, True, True, True)


@pytest.fixture(params=levels(), autouse=True)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernels, "load", loader(request.param).load)
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def problem(
    T: int, D: int, F: int, E: int, K: int = 2, *, gated: bool = True, routing: str = "even", **more: Any
) -> Problem:
    """A mixture of the given sizes. routing: "even", "skewed" (most choices of expert 0), "idle" (half are never met),
    "ragged" (choices are missing)."""
    share = torch.ones(E)
    if routing == "skewed":
        share = 1 / (torch.arange(E) + 1.0) ** 3
    if routing == "idle":
        share[::2] = 0
    expert = torch.multinomial(share.expand(T, E), K, generator=generator(5))
    if routing == "ragged":
        expert = expert.masked_fill(torch.rand(T, K, generator=generator(6)) < 0.3, -1)
    index = rows(Plan(expert=expert, weight=torch.ones(T, K), num_experts=E))
    G, widths = 2 if gated else 1, more.get("widths")
    sizes = ((E, G * F, D), (E, D, F)) if widths is None else ((G * sum(widths), D), (sum(widths), D))
    first, down = (randn(*s, seed=i) / s[-1] ** 0.5 for i, s in enumerate(sizes))
    return Problem(
        x=randn(T, D, seed=2),
        first=first,
        down=down,
        offsets=index.offsets,
        gated=gated,
        unit=index.unit,
        slot=index.slot,
        inverse=index.inverse,
        weight=torch.rand(T, K, generator=generator(7)),
        **{"activation": "silu", **more},
    )


def run(p: Problem) -> tuple[Tensor, Grads]:
    y, hidden = native.forward(p, True)
    return y, native.backward(p, hidden, randn(*y.shape, seed=8), ALL)


def check(p: Problem) -> None:
    """Against the products one expert after the other in float64."""
    floats = {f.name: getattr(p, f.name) for f in dataclasses.fields(p)}
    q = Problem(**{n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in floats.items()})
    want, hidden = by_expert.forward(q, True)
    wanted = by_expert.backward(q, hidden, randn(*want.shape, seed=8).double(), ALL)
    y, grads = run(p)
    assert_close("y", y, want, 2e-6)
    for name, got, right in zip(Grads._fields, grads, wanted, strict=True):
        assert (got is None) == (right is None), name
        if got is not None:
            assert_close(name, got, right, 2e-6)


BIG = {
    "more rows than a task": ((2600, 16, 8, 2), {}),
    "wider than a task": ((30, 24, 300, 3), {}),
    "deeper than a task": ((30, 600, 8, 3), {}),
    "more rows than a chunk": ((700, 40, 36, 2), {"gated": False}),
    "wide and plain": ((64, 70, 530, 2), {"gated": False}),
    "unequal widths": ((300, 33, 0, 3), {"widths": (1, 70, 16)}),
    "one row": ((1, 65, 47, 4), {}),
}


@pytest.mark.parametrize("name", BIG)
def test_sizes(name: str) -> None:
    sizes, more = BIG[name]
    check(problem(*sizes, **more))


@pytest.mark.parametrize("routing", ["even", "skewed", "idle", "ragged"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_routings(routing: str, activation: str) -> None:
    check(problem(90, 37, 29, 6, routing=routing, activation=activation))


def test_a_bank_that_is_changed_in_place_or_moved_computes_with_what_it_is_now() -> None:
    bank = Gated(width=24).build(dim=16, num_experts=4).eval()
    plan = Plan(expert=torch.tensor([[0, 3]] * 9), weight=torch.ones(9, 2), num_experts=4, complete=True)

    def check_now(tolerance: float) -> None:
        with torch.no_grad():
            for T in (1, 9):  # the few-token path, and rows
                part = dataclasses.replace(plan, expert=plan.expert[:T], weight=plan.weight[:T])
                x = randn(9, 16)[:T].to(bank.down.dtype)
                exact = [t.detach().double() for t in (bank.gate_up, bank.down)]
                want = expert_cases.gated_mixture(x, part.weight, rows(part), *exact)
                assert_close("y", bank.mixture(x, part).float(), want, tolerance)

    check_now(2e-6)
    with torch.no_grad():
        bank.down[3].mul_(2)
    check_now(2e-6)
    bank.load_state_dict({n: t + 1 for n, t in bank.state_dict().items()})
    check_now(2e-6)
    bank.to(torch.bfloat16)
    check_now(2e-2)
    bank.to(torch.float32)
    check_now(2e-6)
    bank.double()
    check_now(1e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_results_do_not_depend_on_the_number_of_threads(gated: bool) -> None:
    p = problem(300, 40, 36, 5, gated=gated, routing="skewed")
    torch.set_num_threads(1)
    y, grads = run(p)
    for n in (2, 3):
        torch.set_num_threads(n)
        again, others = run(p)
        assert torch.equal(again, y)
        for a, b in zip(grads, others):
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("T", [1, 7, 130])
def test_a_row_does_not_depend_on_the_rows_beside_it(T: int) -> None:
    whole = problem(130, 40, 70, 5, gated=True, deterministic=True)
    y, grads = run(whole)
    index = whole.inverse
    assert index is not None
    expert = torch.bucketize(index, whole.offsets[1:], right=True)[:T]
    alone = rows(Plan(expert=expert, weight=torch.ones(expert.shape), num_experts=5))
    part = dataclasses.replace(
        whole,
        x=whole.x[:T],
        weight=whole.weight[:T],  # type: ignore[index]
        offsets=alone.offsets,
        unit=alone.unit,
        slot=alone.slot,
        inverse=alone.inverse,
    )
    less, hidden = native.forward(part, True)
    assert torch.equal(less, y[:T])
    found = native.backward(part, hidden, randn(*y.shape, seed=8)[:T], ALL)
    assert torch.equal(found.x, grads.x[:T])  # type: ignore[index, arg-type]
    assert torch.equal(found.weight, grads.weight[:T])  # type: ignore[index, arg-type]


def test_rows_of_nobody_are_zeros() -> None:
    p = problem(20, 16, 8, 3)
    x = torch.full((50, 16), float("nan"))
    x[:40] = randn(40, 16)
    sorted_rows = dataclasses.replace(p, x=x, unit=None, slot=None, inverse=None, weight=None)
    y, grads = run(sorted_rows)
    assert grads.x is not None
    for t in (y, grads.x):
        assert bool(t[:40].isfinite().all())
        assert not bool(t[40:].any())


def test_the_struct_is_as_long_as_the_source_says(level: str) -> None:
    import ctypes

    assert loader(level).load().moestro_experts_problem() == ctypes.sizeof(native._Call)
