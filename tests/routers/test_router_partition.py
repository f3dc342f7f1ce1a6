"""Random uniform partition (48): equal loads, every unit once, no unit's content matters."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moestro.core.plan import demand, load
from moestro.core.signals import Signals
from moestro.routers import Constant, Partition, Router, Uniform

CONFIG = Router(score=Uniform(), select=Partition(), weigh=Constant())


def build(experts: int = 4) -> torch.nn.Module:
    return CONFIG.build(dim=8, num_experts=experts).train()


@pytest.mark.parametrize(("units", "experts"), [(64, 4), (65, 4), (67, 4), (3, 4), (1, 4), (0, 4), (100, 7)])
def test_loads_differ_by_one_at_most_and_the_first_take_more(units: int, experts: int) -> None:
    plan, _ = build(experts)(torch.randn(units, 8), Signals(seed=3))
    want = [units // experts + (e < units % experts) for e in range(experts)]
    assert load(plan.check()).tolist() == demand(plan).tolist() == want
    assert plan.weight.eq(1).all()


def test_padding_takes_no_place() -> None:
    valid = torch.ones(64, dtype=torch.bool)
    valid[::3] = False
    plan, _ = build()(torch.randn(64, 8), Signals(seed=3, valid=valid))
    assert load(plan).tolist() == [11, 11, 10, 10]
    assert (plan.expert[~valid] == -1).all()


def test_another_step_another_partition_and_content_does_not_matter() -> None:
    router, x = build(), torch.randn(64, 8)
    first, _ = router(x, Signals(seed=3))
    assert torch.equal(first.expert, router(-x, Signals(seed=3))[0].expert)
    assert not torch.equal(first.expert, router(x, Signals(seed=4))[0].expert)
    moved = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    signals = Signals(seed=3, unit_id=moved)
    assert torch.equal(router(x, signals)[0].expert, first.expert[moved])  # units are known by number, not by place


def test_every_pair_of_units_parts_about_as_often_as_chance_says() -> None:
    router, x = build(), torch.randn(16, 8)
    together = torch.zeros(16, 16)
    for seed in range(400):
        expert = router(x, Signals(seed=seed))[0].expert
        together += expert == expert.T
    off = together[~torch.eye(16, dtype=torch.bool)] / 400
    assert (off - 3 / 15).abs().max() < 4.5 * (0.2 * 0.8 / 400) ** 0.5  # 3 of the other 15 are with a unit


def test_in_evaluation_a_unit_alone_draws_as_in_its_batch() -> None:
    router, x = build().eval(), torch.randn(64, 8)
    whole, _ = router(x, Signals(seed=3))
    one, _ = router(x[5:6], dataclasses.replace(Signals(seed=3), unit_id=torch.tensor([5])))
    assert torch.equal(one.expert[0], whole.expert[5])
