"""The naive version of each silent failure runs without an error, and the suite rejects it with the right reason."""

from __future__ import annotations

import pytest
import torch

from broken import experts, losses, routers
from moestro.core.plan import Plan
from moestro.losses.config import SwitchBalance
from moestro.testing.experts import check_experts
from moestro.testing.losses import check_loss, check_total
from moestro.testing.routers import check_router


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (losses.Constant, "not in the graph"),
        (losses.Detached, "not in the graph"),
        (losses.SeesPadding, "the content of padding"),
        (losses.MeanOfParts, "the sum of two halves"),
    ],
)
def test_1_a_balance_loss_that_is_constant_detached_or_not_additive(broken, reason):
    with pytest.raises(AssertionError, match=reason):
        check_loss(broken())


def test_1_a_balance_loss_pooled_over_layers():
    with pytest.raises(AssertionError, match="layers were pooled"):
        check_total(losses.pooled_over_layers, collapsed=2.0)

    def ours(plans: list[Plan]) -> torch.Tensor:
        loss = SwitchBalance().build()
        return torch.stack([loss(p) for p in plans]).sum()

    check_total(ours, collapsed=2.0)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (routers.RoutesAgain, "recomputation: tokens were routed again"),
        (routers.DrawsAgain, "two calls with one seed"),
        (routers.RoutesPadding, "padding: an invalid unit was routed"),
        (routers.LowPrecision, "precision: logits"),
        (routers.LooksAhead, "causality in training"),
    ],
)
def test_3_7_8_a_router_that_routes_again_routes_padding_or_chooses_in_low_precision(broken, reason):
    with pytest.raises(AssertionError, match=reason):
        check_router(broken, dim=16, num_experts=8)


def test_a_plain_correct_router_passes():
    check_router(routers.Naive, dim=16, num_experts=8)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (experts.Naive, "starved experts: experts.0 has no gradient"),
        (experts.TakesAnothers, "gradient of weight with starved experts"),
    ],
)
def test_4_an_expert_without_tokens(broken, reason):
    with pytest.raises(AssertionError, match=reason):
        check_experts(broken, num_experts=4)


def test_a_plain_correct_bank_passes():
    check_experts(experts.Stacked, num_experts=4)
