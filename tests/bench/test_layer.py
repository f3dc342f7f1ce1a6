"""Layers side by side: the same problem for everybody, and nobody is timed who solves another one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from moestro.bench import layer as module
from moestro.bench import layers
from moestro.bench.layer import BIG, SHAPE, TOLERANCE, Case, cases, measure
from moestro.bench.peers import Absent
from moestro.bench.problem import Shape, distance, inputs, plain_loop, reference, weights
from moestro.bench.record import summed
from moestro.bench.routings import ROUTINGS, routing
from moestro.core.errors import UserError
from moestro.core.plan import Plan
from moestro.ops.combine import naive as combine_naive
from moestro.ops.expert_mlp import naive as mlp_naive
from moestro.ops.rows import rows


@pytest.fixture(autouse=True, scope="module")
def short_turns():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TURN", 0.0)
        yield


CPU = torch.device("cpu")
TINY = Shape(8, 16, 8, 4, 2)


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(("T", "E", "K"), [(1, 5, 2), (48, 8, 2), (37, 7, 3), (6, 4, 4)])
def test_routings(kind: str, T: int, E: int, K: int) -> None:
    expert, weight = routing(kind, T, E, K, torch.Generator().manual_seed(0))
    assert expert.shape == weight.shape == (T, K)
    assert all(len(set(row)) == K for row in expert.tolist())
    assert 0 <= int(expert.min()) <= int(expert.max()) < E
    torch.testing.assert_close(weight.sum(1), torch.ones(T))


def test_routings_are_what_they_are_called() -> None:
    counts = {
        kind: routing(kind, 256, 32, 4, torch.Generator().manual_seed(0))[0].flatten().bincount(minlength=32)
        for kind in ROUTINGS
    }
    assert counts["balanced"].tolist() == [32] * 32
    assert sorted(counts["idle"].tolist()) == [0] * 16 + [64] * 16
    zipf = counts["zipf"].sort(descending=True).values
    assert int(zipf[0]) > 4 * int(zipf[16]) > 0
    with pytest.raises(UserError, match="unknown routing 'balancd' .did you mean 'balanced'"):
        routing("balancd", 1, 2, 1, torch.Generator())
    with pytest.raises(UserError, match="5 choices among 4 experts"):
        routing("idle", 1, 4, 5, torch.Generator())


def test_the_reference_is_the_oracle() -> None:
    shared, given = weights(TINY, 0, CPU, torch.float32), inputs(TINY, "zipf", 1, CPU, torch.float32)
    index = rows(Plan(expert=given.expert, weight=given.weight, num_experts=4, complete=True))
    out = mlp_naive.gated_mlp(
        given.x.double()[index.unit], shared.gate_up.double(), shared.down.double(), index.offsets
    )
    y = combine_naive.combine(out, given.weight.double(), index)
    found = reference(given, shared, backward=True)
    assert distance(found.y, y) < 1e-14
    assert set(found.grads) == {"x", "weight", "gate_up", "down"}
    leaf = given.x.double().requires_grad_()
    loop = plain_loop(leaf, given.expert, given.weight.double(), shared.gate_up.double(), shared.down.double())
    step = torch.randn(TINY.tokens, TINY.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 1e-6
    moved = plain_loop(leaf + step, given.expert, given.weight.double(), shared.gate_up.double(), shared.down.double())
    change = ((moved - loop) * given.grad).sum()
    torch.testing.assert_close((found.grads["x"] * step).sum(), change.detach(), rtol=1e-4, atol=0)


def test_distance() -> None:
    a = torch.tensor([3.0, 4.0])
    assert distance(a, a.double()) == 0
    assert distance(torch.tensor([3.0, 4.5]), a) == pytest.approx(0.1)
    assert distance(torch.tensor([3.0, math.nan]), a) == math.inf
    assert distance(a[None], a) == math.inf


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    wanted = [
        Case(TINY, "router"),
        Case(TINY, "forward"),
        Case(TINY, "forward + backward", ("balanced", "idle")),
        Case(Shape(1, 16, 8, 4, 2), "forward + backward"),
    ]
    few = {name: layers.PEERS[name] for name in ("transformers grouped_mm", "transformers batched_mm")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "PEERS", few)
        return measure(wanted, rounds=2, peers=True, threads=1)


def test_record(record: dict[str, Any]) -> None:
    assert json.loads(json.dumps(record)) == record
    sizes = "D 16 F 8 E 4 K 2"
    assert list(record["regimes"]) == [
        f"router, T 8 {sizes}",
        f"forward, T 8 {sizes}, balanced",
        f"forward + backward, T 8 {sizes}, balanced",
        f"forward + backward, T 8 {sizes}, idle",
        f"forward + backward, T 1 {sizes}, balanced",
    ]
    assert record["machine"]["threads"] == 1
    assert {"before", "after"} == set(record["load_average"])
    assert record["peak_memory"]["process"] > 1 << 20
    regime = record["regimes"][f"forward + backward, T 8 {sizes}, idle"]
    assert regime["ours"] == "moestro"
    for name in ("moestro", "moestro, torch path", "loop, unbind", "transformers grouped_mm"):
        row = regime["rows"][name]
        assert set(row["errors"]) == {"y", "x", "weight", "gate_up", "down"}
        assert 0 < max(row["errors"].values()) <= TOLERANCE[torch.float32]
        assert len(row["seconds"]) == 2
        assert row["milliseconds"]["least"] == pytest.approx(1e3 * min(row["seconds"]))
    assert regime["rows"]["dense, width K*F"]["bar"]
    assert "dense, width E*F" not in regime["rows"]  # it was timed once, under the first routing
    assert "dense, width E*F" in record["regimes"][f"forward + backward, T 8 {sizes}, balanced"]["rows"]
    assert set(record["regimes"][f"forward, T 8 {sizes}, balanced"]["rows"]["moestro"]["errors"]) == {"y"}
    touched = record["regimes"][f"forward + backward, T 1 {sizes}, balanced"]["rows"]["moestro, touched experts only"]
    assert set(touched["errors"]) == {"y", "x", "weight", "gate_up", "down"}
    assert len(touched["seconds"]) == 2
    router = record["regimes"][f"router, T 8 {sizes}"]["rows"]
    assert router["moestro router"]["errors"]["differing"] == 0


def test_what_is_derived_can_be_derived_again(record: dict[str, Any]) -> None:
    for regime in record["regimes"].values():
        assert summed(regime) == {"rows": regime["rows"], "ratios": regime["ratios"]}


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.makers

    def with_wrong_ones(shape: Shape, shared: Any, backward: bool, peers: bool) -> dict[str, layers.Maker]:
        def wrong(what: str) -> layers.Layer:
            leaves = {"gate_up": shared.gate_up.clone().requires_grad_(), "down": shared.down.clone().requires_grad_()}

            def run(x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
                given = weight.detach() if what == "weight" else weight
                y = plain_loop(x, expert, given, *leaves.values())
                return y * 1.001 if what == "y" else y

            return layers.Layer(run, leaves)

        def absent() -> layers.Layer:
            raise Absent("it is not here")

        return right(shape, shared, backward, peers) | {
            "wrong output": lambda: wrong("y"),
            "no gradient of weights": lambda: wrong("weight"),
            "absent": absent,
        }

    monkeypatch.setattr(layers, "makers", with_wrong_ones)
    record = measure([Case(TINY, "forward + backward")], rounds=1, threads=1)
    (regime,) = record["regimes"].values()
    wrong, blind = regime["rows"]["wrong output"], regime["rows"]["no gradient of weights"]
    assert "its output is" not in blind["refused"]
    assert wrong["errors"]["y"] == pytest.approx(1e-3, rel=1e-3)
    assert "1.0e-03 away from float64" in wrong["refused"]
    assert "its gradient of weight is inf away" in blind["refused"]
    assert regime["rows"]["absent"] == {"absent": "it is not here"}
    for row in (wrong, blind, regime["rows"]["absent"]):
        assert "seconds" not in row
    assert {"wrong output", "no gradient of weights", "absent"}.isdisjoint(regime["ratios"])
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_slow_ones_sit_out_the_last_rounds() -> None:
    record = measure([Case(TINY, "forward")], rounds=5, threads=1, budget=0.0)
    (regime,) = record["regimes"].values()
    assert {len(row["seconds"]) for row in regime["rows"].values()} == {3}


def test_cases() -> None:
    found = cases()
    assert BIG in {case.shape for case in found}
    names = [name for case in found for name in case.regimes(torch.float32)]
    assert len(set(names)) == len(names)
    D, F, E, K = SHAPE
    for T in (1, 64, 256, 2048, 4096):
        assert f"forward + backward, T {T} D {D} F {F} E {E} K {K}, balanced" in names
    assert f"forward, T 2048 D {D} F {F} E {E} K {K}, zipf" in names
    assert BIG not in {case.shape for case in cases((8, 8, 4, 2))}
    assert cases((8, 8, 4, 2), (5,))[1].regimes(torch.bfloat16) == ["forward, T 5 D 8 F 8 E 4 K 2 bfloat16, balanced"]


def test_impossible_requests() -> None:
    with pytest.raises(UserError, match="at least one round"):
        measure([Case(TINY, "forward")], rounds=0)
    with pytest.raises(UserError, match="dtype torch.int8"):
        measure([Case(TINY, "forward")], dtype=torch.int8)
