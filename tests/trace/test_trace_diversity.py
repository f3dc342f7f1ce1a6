"""Redundancy (41, arXiv 2303.01610) and Frobenius distance (32, MoLA) of experts, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.core.errors import UserError
from moestro.experts.config import MLP, Gated
from moestro.moe.config import MoELayer
from moestro.trace.diversity import cosines, diversity, diversity_of_model, diversity_of_products

EXPERTS = torch.tensor([[[3.0, 4.0]], [[4.0, 3.0]], [[-3.0, -4.0]]])


def test_mean_cosine_and_mean_distance_by_hand() -> None:
    """(3,4), (4,3), (-3,-4): cosines 24/25, -1, -24/25; distances sqrt 2, 10, sqrt(49 + 49)."""
    made = diversity(EXPERTS)
    assert made.cosine == pytest.approx(-1 / 3)
    assert made.distance == pytest.approx((math.sqrt(2) + 10 + math.sqrt(98)) / 3)
    assert diversity(list(EXPERTS)) == made
    assert diversity({"a": EXPERTS[..., :1], "b": EXPERTS[..., 1:]}) == pytest.approx(made)
    torch.testing.assert_close(cosines(EXPERTS)[0], torch.tensor([1.0, 0.96, -1.0], dtype=torch.float64))


def test_copies_zeros_and_one_alone() -> None:
    assert diversity(EXPERTS[:1].expand(4, 1, 2)) == pytest.approx((1.0, 0.0))
    assert diversity(torch.stack([torch.zeros(2), torch.ones(2)])) == pytest.approx((0.0, math.sqrt(2)))
    assert diversity(EXPERTS[:1]) == (1.0, 0.0)


def test_products_are_never_made() -> None:
    """The updates B A of LoRA experts, against the products themselves."""
    draws = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, 5, 2, generator=draws), torch.randn(4, 2, 7, generator=draws)
    assert diversity_of_products(left, right) == pytest.approx(diversity(left.double() @ right.double()))
    assert diversity_of_products(left[:1], right[:1]) == (1.0, 0.0)


def test_experts_of_other_shapes_are_an_error() -> None:
    with pytest.raises(UserError, match="different shapes"):
        diversity([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(UserError, match="different numbers of experts"):
        diversity({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)})


def test_banks_of_a_model() -> None:
    """All matrices of a bank together; biases, routers and shared experts do not count."""
    plain = MoELayer(num_experts=3, experts=MLP(width=4, bias=True), shared=MLP(width=4)).build(dim=2)
    gated = MoELayer(num_experts=2, experts=Gated(width=4)).build(dim=2)
    model = torch.nn.ModuleDict({"plain": plain, "gated": gated})
    found = diversity_of_model(model)
    assert list(found) == ["plain.experts", "gated.experts"]
    own = [torch.cat([plain.experts.up[e].flatten(), plain.experts.down[e].flatten()]) for e in range(3)]
    assert found["plain.experts"] == pytest.approx(diversity(own))
    with torch.no_grad():
        gated.experts.gate_up[1], gated.experts.down[1] = gated.experts.gate_up[0], gated.experts.down[0]
    assert diversity_of_model(model)["gated.experts"] == pytest.approx((1.0, 0.0))
