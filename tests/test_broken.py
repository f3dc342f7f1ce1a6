"""The naive version of each silent failure runs without an error, and the suite rejects it with the right reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from broken import adapters, experts, losses, optimizers, routers, training
from moestro.adapt import LoRA
from moestro.adapt.attach import attach
from moestro.core.plan import Plan
from moestro.losses.config import SwitchBalance
from moestro.models.examples import examples as decoders
from moestro.optim.clip import grad_norm
from moestro.testing.adapters import check_adapters
from moestro.testing.experts import check_experts
from moestro.testing.losses import check_loss, check_total
from moestro.testing.optimizers import check_optimizer
from moestro.testing.routers import check_router
from moestro.testing.training import check_counts, check_load, check_norm
from moestro.train.weights import load_weights


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


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("checkpointing", "change with recomputation"),
        ("evaluations", "change with an evaluation before"),
        ("accumulation", "change with four micro-batches"),
        ("cast", "after a cast to bf16"),
    ],
)
def test_2_counters_that_drift(which, reason):
    with pytest.raises(AssertionError, match=reason):
        check_counts(training.drifting(which), tokens=4 * 600 * 2)


def test_2_counts_from_trails_do_not_drift():
    def counts(*, micro_batches=1, checkpointing=False, evaluations=0, cast=False):
        model = decoders()["moe"].replace(context=300, checkpoint=checkpointing).build()
        model = model.to(torch.bfloat16) if cast else model
        tokens = torch.randint(0, 37, (4, 300), generator=torch.Generator().manual_seed(0))
        found: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for _ in range(evaluations):
                model.eval()(tokens)
        model.train()
        for part in tokens.chunk(micro_batches):
            nats, number, _, trail = model.loss(part, part)
            (nats / number + trail.loss()).backward()
            for path, count in trail.counts().items():
                found[path] = found[path] + count if path in found else count
        return found

    check_counts(counts, tokens=4 * 300 * 2)


def test_5_a_gradient_norm_that_depends_on_the_layout():
    with pytest.raises(AssertionError, match="gradient norm with one bank and a router"):
        check_norm(training.mean_of_group_norms)
    check_norm(grad_norm)


def test_6_a_load_that_leaves_weights_random():
    with pytest.raises(AssertionError, match="a missing tensor was accepted"):
        check_load(decoders()["moe"].build, training.load_what_fits)
    check_load(decoders()["moe"].build, lambda model, tensors: load_weights(model, tensors, Path("model.safetensors")))


@pytest.mark.parametrize("broken", [optimizers.TakesTheStackForAMatrix, optimizers.TakesFusedPartsForAMatrix])
def test_9_an_optimiser_that_takes_the_stack_for_one_matrix(broken):
    with pytest.raises(AssertionError, match="stepped in its stack and alone"):
        check_optimizer(broken)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (adapters.every_linear_layer, "reach: no adapter reaches expert 0 of layers.0.ffn"),
        (adapters.write_out_all_updates, "as many as an update of all experts"),
        (lambda model: model.embed.requires_grad_(False), "frozen: .* trains"),
    ],
)
def test_10_adapters_that_skip_stacked_experts_or_write_their_updates_out(broken, reason):
    with pytest.raises(AssertionError, match=reason):
        check_adapters(broken)


@pytest.mark.parametrize("shared", ["none", "a", "b", "both"])
def test_10_adapters_that_reach_every_expert(shared):
    check_adapters(lambda model: attach(model, LoRA(targets=("experts", "attention"), rank=2, shared=shared)))
