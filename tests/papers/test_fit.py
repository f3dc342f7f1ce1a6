"""The loop of comparisons: it learns, repeats, moves what routers keep, and says when a loss is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moestro.core.errors import UserError
from moestro.losses.config import SwitchBalance
from moestro.models.config import Decoder
from moestro.optim.config import ExpertAveraging
from moestro.papers.fit import fit
from moestro.papers.paper import Arm, Diverged, Job
from moestro.routers.config import LossFree, Router, TopK
from moestro.tasks.batches import Batch
from moestro.tasks.config import NextToken
from moestro.train.knobs import LinearRamp
from moestro.train.presets import preset

S, B = 16, 4


def batch(step: int) -> Batch:
    """Counting upwards from another number in every row: easy to learn."""
    tokens = (torch.arange(S + 1) + torch.arange(B)[:, None] * 5 + step) % 32
    return Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], unit_id=torch.arange(B * S), text_bytes=float(B * S))


def model(router: Router | None = None, seed: int = 0) -> Decoder:
    made = preset("tiny").model.replace(vocab_size=32, seed=seed)
    if router is None:
        return made
    assert made.moe is not None
    return made.replace(moe=made.moe.replace(router=router, losses=(SwitchBalance(coefficient=0.0),)))


def job(**changes: Any) -> Job:
    settings: dict[str, Any] = {"arm": Arm(name="a"), "seed": 0, "lr": 1e-2, "updates": 12}
    return Job(**(settings | {"data": None, "shared": Path()} | changes))


def trained(config: Decoder, **changes: Any) -> nn.Module:
    made = config.build()
    fit(made, NextToken().build(), batch, job(**changes))
    return made


def weights(made: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in made.parameters()])


def test_it_learns_and_tells() -> None:
    losses: list[float] = []
    ticks: list[int] = []
    made = model().build()

    def watch(step: int, outcome: Any) -> None:
        assert step == len(losses)
        losses.append(float(outcome.loss.detach() / outcome.count))

    fit(made, NextToken().build(), batch, job(tick=ticks.append), watch=watch)
    assert losses[-1] < 0.8 * losses[0]
    assert ticks == [1] * 12


def test_it_repeats_and_seeds_differ_in_draws_only() -> None:
    first = weights(trained(model()))
    assert torch.equal(first, weights(trained(model())))
    assert not torch.equal(first, weights(trained(model(seed=1))))


def test_it_leaves_frozen_parts_alone() -> None:
    made = model().build()
    embedding = next(p for name, p in made.named_parameters() if "embed" in name)
    embedding.requires_grad_(False)
    before = embedding.detach().clone()
    fit(made, NextToken().build(), batch, job())
    assert torch.equal(embedding, before)


def test_state_of_routers_and_hooks_move() -> None:
    made = trained(model(Router(select=LossFree(inner=TopK(k=2)))), updates=3)
    biases = [b for name, b in made.named_buffers() if "bias" in name]
    assert biases
    assert any(b.abs().max() > 0 for b in biases)
    plain, averaged = model().build(), model().build()
    fit(plain, NextToken().build(), batch, job(updates=4))
    fit(averaged, NextToken().build(), batch, job(updates=4), after=(ExpertAveraging(share=0.9, rise="constant"),))
    assert _apart(averaged) < 0.5 * _apart(plain)


def _apart(made: nn.Module) -> float:
    """Mean distance of experts from their mean."""
    found = [p.detach() for name, p in made.named_parameters() if name.endswith("experts.down")]
    return float(torch.stack([(p - p.mean(0)).square().mean() for p in found]).mean())


def test_knobs_follow_their_schedule() -> None:
    seen: list[int] = []

    def watch(step: int, outcome: Any) -> None:
        plan = next(iter(outcome.trail.plans().values()))
        seen.append(plan.expert.shape[1])

    fit(model().build(), NextToken().build(), batch, job(updates=4), knobs=(LinearRamp(start=1, end=4),), watch=watch)
    assert seen == [1, 2, 3, 3]  # 1 + round(3 t / 4), halves to even
    with pytest.raises(UserError, match="can choose 1 to 4 experts"):
        fit(model().build(), NextToken().build(), batch, job(updates=4), knobs=(LinearRamp(start=1, end=5),))


def test_a_loss_that_is_not_finite() -> None:
    class Broken:
        def __call__(self, *args: Any) -> Any:
            outcome = NextToken().build()(*args)
            return outcome._replace(loss=outcome.loss * float("inf"))

    made = model().build()
    before = weights(made)
    with pytest.raises(Diverged, match="arm a, seed 0, learning rate 0.01: the loss of update 1 is not finite"):
        fit(made, Broken(), batch, job())
    assert torch.equal(weights(made), before)
    assert issubclass(Diverged, UserError)
