"""The sweep over experts (39): equal compute, equal batches, sizes of the whole published grid by the brief's rule."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from moestro.models.sizes import OPTIMAL_SPARSITY, short_count
from moestro.papers.optimal_sparsity import PAPER, counted, family
from moestro.papers.paper import Job
from moestro.tasks.data.streams import DomainBatches


def test_39_members_take_equal_flops_and_half_as_wide_experts_twice_as_many() -> None:
    members = family(smoke=False)
    base = members["E8-k2"]
    for name, member in members.items():
        apart = member.flops_per_token(256) / base.flops_per_token(256) - 1
        assert abs(apart) <= 0.01, name
    widths: dict[str, Any] = {name: m.moe.experts.width for name, m in members.items()}  # type: ignore[union-attr]
    assert widths["E8-k2"] == 128
    assert widths["E16-k4"] == pytest.approx(widths["E16-k2"] / 2, abs=4)
    total = [members[f"E{e}-k2"].num_params() for e in (2, 4, 8, 16, 32)]
    assert total == sorted(total)


def test_39_two_members_of_the_sweep_see_byte_identical_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PAPER.sample(tmp_path)
    data, seen = PAPER.data(tmp_path), []
    original = DomainBatches.train

    def spied(self: DomainBatches, *args: Any, **more: Any) -> Any:
        batch = original(self, *args, **more)
        seen.append(hashlib.sha256(batch.tokens.numpy().tobytes() + batch.targets.numpy().tobytes()).hexdigest())
        return batch

    monkeypatch.setattr(DomainBatches, "train", spied)
    arms = {arm.name: arm for arm in PAPER.arms(True)}
    for name in ("E2-k2", "E32-k2"):
        PAPER.train(Job(arm=arms[name], seed=1, lr=1e-3, updates=3, data=data, shared=tmp_path, smoke=True))
    assert seen[:3] == seen[3:]
    assert len(set(seen[:3])) == 3


def test_39_the_published_names_follow_from_counting() -> None:
    """total = 16 (E 6 d^2 + 4 d^2 + E d) + 2 V d, active with k for E in the first term; and norms, 33 d."""
    want = []
    for d in OPTIMAL_SPARSITY["dim"]:
        for experts in OPTIMAL_SPARSITY["num_experts"]:
            for k in OPTIMAL_SPARSITY["top_k"]:
                if k < experts:
                    rest = 16 * (4 * d * d + experts * d) + 2 * 99_487 * d + 33 * d
                    total, active = (16 * met * 6 * d * d + rest for met in (experts, k))
                    name = f"d{d}-E{experts}-k{k}-{short_count(total)}-A{short_count(active)}"
                    want.append((f"{name}: parameters", total))
    found = {c.what: c.ours for c in counted() if c.what.endswith(": parameters")}
    assert list(found.items()) == want
    assert len(want) == 63  # k = 8 and 16 of 8 experts, k = 16 of 16 are no models of the grid
    published = {c.what for c in counted() if c.published is not None}
    assert {w for w in published if "parameters" in w} == {
        "d512-E8-k2-320M-A170M: parameters",
        "d1024-E16-k2-1.9B-A470M: parameters",
        "d2048-E128-k2-52B-A1.5B: parameters",
    }
    for c in counted():
        if c.published is not None:
            assert c.ours == pytest.approx(c.published, rel=0.02)
