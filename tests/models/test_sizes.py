"""Sizes by counting (brief 39)."""

from __future__ import annotations

from typing import Any

import pytest

from moestro.core.errors import UserError
from moestro.experts import Gated
from moestro.models import Decoder, examples
from moestro.models.sizes import (
    OPTIMAL_SPARSITY,
    iso_compute,
    optimal_sparsity,
    optimal_sparsity_grid,
    short_count,
    size_name,
    size_of,
    size_table,
    sparsity,
    tokens_per_parameter,
)
from moestro.moe import MoELayer
from moestro.nn import Attention
from moestro.routers import Router, TopK, TopP

PUBLISHED = {
    (512, 8, 2): "d512-E8-k2-320M-A170M",
    (1024, 16, 2): "d1024-E16-k2-1.9B-A470M",
    (2048, 128, 2): "d2048-E128-k2-52B-A1.5B",
}


@pytest.mark.parametrize(("sizes", "name"), PUBLISHED.items())
def test_brief_39_published_names_are_what_counting_gives(sizes, name):
    assert size_name(optimal_sparsity(*sizes)) == name


@pytest.mark.parametrize("sizes", [(512, 8, 2), (1024, 16, 4), (2048, 256, 16)])
def test_brief_39_counting_rules(sizes):
    """total = 16 (E 6 d^2 + 4 d^2 + E d) + 2 V d, the same with K for active, and 33 norms."""
    d, e, k = sizes
    config = optimal_sparsity(d, e, k)
    rest = 16 * (4 * d * d + e * d) + 2 * 99_487 * d + 33 * d
    assert config.num_params() == 16 * e * 6 * d * d + rest
    assert config.num_active_params() == 16 * k * 6 * d * d + rest


def test_brief_39_tokens_per_parameter_and_sparsity():
    small, large = optimal_sparsity(512, 8, 2), optimal_sparsity(2048, 128, 2)
    assert tokens_per_parameter(small, 125e9) == pytest.approx(390, rel=2e-3)
    assert tokens_per_parameter(large, 125e9) == pytest.approx(2.4, rel=5e-3)
    assert (sparsity(small), sparsity(large)) == (0.75, 1 - 2 / 128)
    assert sparsity(examples()["dense"]) == 0


def test_the_published_grid():
    grid = optimal_sparsity_grid()
    pairs = [(e, k) for e in OPTIMAL_SPARSITY["num_experts"] for k in OPTIMAL_SPARSITY["top_k"] if k < e]
    assert len(grid) == 3 * len(pairs)
    few, more = size_table((grid["d512-E8-k2"], grid["d512-E8-k4"]), tokens=125e9)
    assert few.name == PUBLISHED[512, 8, 2]
    assert few.total == more.total > more.active > few.active
    assert few.flops == more.flops - 2 * 16 * 2 * 6 * 512**2
    assert few.tokens_per_parameter == pytest.approx(390, rel=2e-3)


def test_sizes_of_other_decoders():
    mixed = size_of(examples()["mixed"])
    assert (mixed.num_experts, mixed.top_k) == (4.5, 2)  # 3 and 6 experts
    assert mixed.sparsity == pytest.approx(1 - 4 / 9)
    dense = size_of(examples()["dense"], tokens=1e6)
    assert (dense.num_experts, dense.sparsity) == (0, 0)
    assert dense.total == dense.active
    assert dense.tokens_per_parameter == 1e6 / dense.total
    assert "E" not in dense.name
    assert size_of(examples()["latent-v3"]).top_k == 2  # inside of two other selections


def test_a_selection_without_a_fixed_k_counts_what_it_expects():
    config = BASE.replace(moe=MoELayer(num_experts=8, router=Router(select=TopP(p=0.4)), experts=Gated(width=8)))
    assert 0 <= sparsity(config) < 1


@pytest.mark.parametrize(
    ("count", "said"),
    [(168_987_136, "170M"), (1.881e9, "1.9B"), (52.2e9, "52B"), (995e6, "1B"), (9.96e5, "1M"), (2_000, "2K"), (7, "7")],
)
def test_two_significant_digits(count, said):
    assert short_count(count) == said


BASE = Decoder(
    vocab_size=256,
    dim=96,
    num_layers=3,
    attention=Attention(num_heads=4),
    moe=MoELayer(num_experts=8, router=Router(select=TopK(k=2)), experts=Gated(width=192)),
    context=64,
)


def test_brief_39_families_of_equal_active_compute():
    family = iso_compute(BASE, num_experts=(2, 4, 8, 16, 32), top_k=(2, 4))
    made: dict[str, Any] = family
    assert list(family) == ["E2-k2", "E4-k2", "E8-k2", "E16-k2", "E32-k2", "E4-k4", "E8-k4", "E16-k4", "E32-k4"]
    assert family["E8-k2"] == BASE
    budget = BASE.flops_per_token(64)
    for name, config in made.items():
        assert abs(config.flops_per_token(64) - budget) <= 0.01 * budget, name
        assert f"E{config.moe.num_experts}-k{config.moe.router.select.k}" == name
        assert config.moe.experts.width % 2 == 0
    assert made["E16-k4"].moe.experts.width == 96  # half as wide, twice as many
    totals = [family[f"E{e}-k2"].num_params() for e in (2, 4, 8, 16, 32)]
    assert totals == sorted(totals)


def test_a_family_for_a_given_budget_counts_routers():
    """By hand, one layer: FLOPs = rest + 2 E d + 6 d K F."""
    base = BASE.replace(num_layers=1)
    family: Any = iso_compute(base, (4, 64), (1,), flops=400_000, seq_len=16, width_step=1)
    rest = base.flops_per_token(16) - 2 * 8 * 96 - 6 * 96 * 2 * 192
    for e in (4, 64):
        width = family[f"E{e}-k1"].moe.experts.width
        assert width == round((400_000 - rest - 2 * e * 96) / (6 * 96))


def test_budgets_that_cannot_be_met():
    with pytest.raises(UserError, match="raise the budget"):
        iso_compute(BASE, (8,), (2,), flops=1000)
    with pytest.raises(UserError, match="needs `moe`"):
        iso_compute(BASE.replace(moe=None), (8,), (2,))
    with pytest.raises(UserError, match="top k"):
        iso_compute(BASE.replace(moe=MoELayer(router=Router(select=TopP()))), (8,), (2,))
