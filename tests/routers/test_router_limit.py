"""Limit steps, each against drops worked out by hand."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import MissingSignalError, UserError
from moestro.core.plan import Plan, demand, load
from moestro.core.signals import Signals
from moestro.routers import (
    BatchPrioritised,
    ByPosition,
    ByProbability,
    Capacity,
    FirstChoices,
    FixedCapacity,
    Priority,
    RandomSecond,
    Raw,
    Recycle,
    Renormalised,
    Router,
    TopK,
    TopP,
)
from moestro.routers.room import share
from routers.router_cases import E, build, exact, log, signals, units

T, F = True, False


def limited(x: torch.Tensor, limit, k: int = 2, given: Signals | None = None, train: bool = True, **more) -> Plan:
    more = {"weigh": Raw(), **more}
    router = exact(Router(select=TopK(k=k), limit=limit, **more), x.shape[1] - len(more.get("virtual", ())))
    return router.train(train)(x, given or Signals())[0].check()


# Four units, three experts, two choices each; expert 0 and 1 are wanted by many.
CHOICES = [[0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.7, 0.2, 0.1], [0.1, 0.55, 0.35]]  # (0,1) (1,0) (0,1) (1,2)


@pytest.mark.parametrize(
    ("priority", "kept"),
    [
        # room 2 each. In turn: u0 0,1; u1 1,0; u2 finds 0 and 1 full; u3 finds 1 full, takes 2
        (ByPosition(), [[T, T], [T, T], [F, F], [F, T]]),
        # first choices: 0 <- u0 u2 (full), 1 <- u1 u3 (full), so second choices of u0, u1, u2 are lost
        (FirstChoices(), [[T, F], [T, F], [T, F], [T, T]]),
        # expert 0: .7 .6 | .3;  expert 1: .55 .5 | .3 .2
        (ByProbability(), [[T, F], [T, F], [T, F], [T, T]]),
        (BatchPrioritised(), [[T, F], [T, F], [T, F], [T, T]]),
    ],
)
def test_room_for_two(priority: Priority, kept: list[list[bool]]) -> None:
    plan = limited(log(CHOICES), Capacity(factor=0.75, min_capacity=0, priority=priority))  # ceil(.75 * 2 * 4 / 3) = 2
    assert plan.expert.tolist() == [[0, 1], [1, 0], [0, 1], [1, 2]]
    assert plan.kept.tolist() == kept
    assert plan.capacity == 2
    assert not plan.complete
    torch.testing.assert_close(
        plan.weight, torch.tensor([[0.6, 0.3], [0.5, 0.3], [0.7, 0.2], [0.55, 0.35]]) * plan.kept
    )
    assert demand(plan).tolist() == [3, 4, 1]
    assert load(plan).tolist() == plan.expert[plan.kept].bincount(minlength=3).tolist()


@pytest.mark.parametrize(
    ("priority", "kept"),
    [
        (ByPosition(), [[T, T], [F, F], [F, F], [F, T]]),
        (FirstChoices(), [[T, F], [T, F], [F, F], [F, T]]),
        # expert 0 goes to u2 (.7), expert 1 to u3 (.55), expert 2 to u3
        (ByProbability(), [[F, F], [F, F], [T, F], [T, T]]),
        # units in the order u2 (.7), u0 (.6), u3 (.55), u1 (.5), first choices first
        (BatchPrioritised(), [[F, F], [F, F], [T, F], [T, T]]),
    ],
)
def test_room_for_one(priority: Priority, kept: list[list[bool]]) -> None:
    plan = limited(log(CHOICES), Capacity(factor=0.1, min_capacity=1, priority=priority))
    assert plan.kept.tolist() == kept
    assert plan.capacity == 1


def test_first_choices_beat_more_probable_second_choices_only_there() -> None:
    # expert 0 is u0's second choice (.45) and u1's first (.4); room for one
    x = log([[0.45, 0.5, 0.05], [0.4, 0.25, 0.35]])
    kept = {
        type(p).__name__: limited(x, Capacity(factor=0.1, min_capacity=1, priority=p)).kept[:, 0:2].tolist()
        for p in (FirstChoices(), ByProbability(), BatchPrioritised())
    }
    assert kept["FirstChoices"] == [[T, F], [T, T]]
    assert kept["ByProbability"] == [[T, T], [F, T]]
    assert kept["BatchPrioritised"] == [[T, F], [T, T]]


def test_weights_of_survivors_keep_the_share_of_the_dropped() -> None:
    plan = limited(log(CHOICES), Capacity(factor=0.75, min_capacity=0, priority=FirstChoices()), weigh=Renormalised())
    torch.testing.assert_close(plan.weight[0], torch.tensor([0.6 / 0.9, 0.0]))


def test_capacity_is_exact_arithmetic() -> None:
    assert share(1.1, 10, 11, up=True) == 1  # 1.1 * 10 / 11 is 1.0000000000000002 in floating point
    assert share(1.25, 100, 8, up=True) == 16
    assert share(1.25, torch.tensor([100, 0, 7]), 8, up=True).tolist() == [16, 0, 2]
    assert share(0.3, 10, 3, up=False) == 1
    assert int(share(1 / 3, torch.tensor(3_000_000), 1, up=True)) == 1_000_000  # and within 64 bits
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="capacity_factor"):
            share(bad, 10, 3, up=True)


def test_room_is_rounded_up() -> None:
    plan = limited(torch.zeros(9, 4), Capacity(factor=1.0, min_capacity=0), k=1)  # 9 / 4
    assert plan.capacity == 3
    assert load(plan).tolist() == [3, 0, 0, 0]


def test_factor_in_training_evaluation_and_per_call() -> None:
    x = torch.zeros(40, 4)  # everybody wants experts 0 and 1
    limit = Capacity(factor=0.5, eval_factor=1.5, min_capacity=1)
    assert load(limited(x, limit)).tolist() == [10, 10, 0, 0]
    assert load(limited(x, limit, train=False)).tolist() == [30, 30, 0, 0]
    called = limited(x, limit, given=Signals(knobs={"capacity_factor": 0.25}))
    assert load(called).tolist() == [5, 5, 0, 0]
    assert called.capacity == 5
    assert load(limited(x, limit.replace(min_capacity=17))).tolist() == [17, 17, 0, 0]
    assert limited(x, limit.replace(min_capacity=100)).capacity == 40  # never more rows than units


def test_padding_takes_no_room_and_gives_none() -> None:
    x = torch.zeros(8, 4)
    valid = torch.tensor([F, F, T, T, F, T, T, F])
    plan = limited(x, Capacity(factor=1.0, min_capacity=1), given=Signals(valid=valid))
    assert load(plan).tolist() == [2, 2, 0, 0]  # ceil(1 * 2 * 4 valid / 4)
    assert plan.capacity == 4  # from the shape: ceil(1 * 2 * 8 / 4)
    assert plan.kept[valid].all(1).tolist() == [T, T, F, F]
    assert (plan.expert[~valid] == -1).all()


def test_virtual_ids_are_not_limited() -> None:
    x = torch.tensor([[0.0, -9.0, 5.0, 3.0]]).expand(6, 4)  # null first, then copy
    plan = limited(x, Capacity(factor=0.1, min_capacity=1), virtual=("null", "copy"))
    assert plan.expert.tolist() == [[2, 3]] * 6
    assert plan.kept.all()
    plan = limited(-x, Capacity(factor=0.1, min_capacity=1), virtual=("null", "copy"))
    assert plan.expert.tolist() == [[1, 0]] * 6
    assert plan.kept.tolist() == [[T, T]] + [[F, F]] * 5


def test_room_per_segment() -> None:
    x = torch.zeros(9, 3)
    segment = torch.tensor([5, 5, 5, 5, 2, 2, 2, 7, 7])
    limit = Capacity(factor=0.75, min_capacity=1, per="segment")
    plan = limited(x, limit, k=1, given=Signals(segment=segment))
    assert plan.kept[:, 0].tolist() == [T, F, F, F, T, F, F, T, F]
    assert plan.capacity == 3
    with pytest.raises(MissingSignalError, match="segment"):
        limited(x, limit)
    valid = torch.tensor([F, T, T, T, F, F, F, T, T])
    plan = limited(x, limit, k=1, given=Signals(segment=segment, valid=valid))
    assert plan.kept[valid, 0].tolist() == [T, F, F, T, F]


def test_tables_with_holes() -> None:
    router = build(Router(select=TopP(p=0.5, max_k=4), weigh=Raw(), limit=Capacity(factor=0.5, min_capacity=1)))
    plan = router(units(50))[0].check()
    assert (plan.expert < 0).any()
    assert plan.kept[plan.expert < 0].all()
    assert not plan.kept.all()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("order", [FirstChoices(), ByPosition(), ByProbability()])
@pytest.mark.parametrize("per", ["batch", "segment"])
def test_recycling(k: int, order: Priority, per: str) -> None:
    limit = Capacity(factor=1.0, min_capacity=0, priority=order, per=per)  # type: ignore[arg-type]
    again = limit.replace(priority=Recycle(order=order))
    x, given = units(64) + 1.0, signals(64, per_segment=16)
    dropped = build(Router(select=TopK(k=k), weigh=Raw(), limit=limit))(x, given)[0].check()
    plan = build(Router(select=TopK(k=k), weigh=Raw(), limit=again))(x, given)[0].check()
    assert torch.equal(plan.extra["chosen"], dropped.expert)
    assert torch.equal(plan.expert[dropped.kept], dropped.expert[dropped.kept])
    assert plan.kept[dropped.kept].all()
    moved = plan.expert != dropped.expert
    assert moved.sum() > 5
    assert torch.equal(plan.kept, dropped.kept | moved)
    torch.testing.assert_close(plan.weight[moved], plan.probs.gather(1, plan.expert)[moved])
    on = torch.where(plan.kept, plan.expert, -1 - torch.arange(k))
    assert all(len(set(row)) == k for row in on.tolist()), "a unit got an expert twice"
    if k == 1:  # there is room for everybody, and nobody can clash
        assert plan.kept.all()
        assert load(plan).tolist() == [8] * E
    if per == "segment":
        of = plan.expert.where(plan.kept, torch.tensor(-1)).view(4, 16 * k)
        assert all((row == e).sum() <= -(-16 * k // E) for row in of for e in range(E))
    other = build(Router(select=TopK(k=k), weigh=Raw(), limit=again))(x, signals(64, per_segment=16, seed=9))[0]
    assert not torch.equal(other.expert, plan.expert)


def test_a_draw_that_clashes_is_repeated() -> None:
    """Three choices of eight experts, room for twice as many: a third of the draws clash, few do so four times."""
    limit = Capacity(factor=2.0, min_capacity=0, priority=Recycle())
    x = torch.zeros(400, E)
    x[:, :3] = 3.0
    plan = limited(x, limit, k=3)
    assert (plan.extra["chosen"] == torch.tensor([0, 1, 2])).all()
    assert plan.kept.float().mean() > 0.98


def test_recycling_draws_every_free_expert() -> None:
    x = torch.zeros(400, 4)
    x[:, 0] = 4.0
    plan = limited(x, Capacity(factor=0.5, min_capacity=1, priority=Recycle()), k=1)
    assert load(plan).tolist() == [50] * 4
    moved = plan.expert[plan.extra["chosen"] != plan.expert]
    early = moved[:60].bincount(minlength=4)
    assert (early[1:] > 8).all()


def test_second_choices_survive_in_proportion() -> None:
    n = 8000
    for p2, threshold, expected in ((0.1, 0.5, 0.2), (0.3, 0.5, 0.6), (0.1, 0.2, 0.5), (0.3, 0.2, 1.0)):
        x = log([[1 - p2, p2]]).expand(n, 2)
        plan = limited(x, RandomSecond(threshold=threshold), given=signals(n), weigh=Renormalised())
        assert plan.kept[:, 0].all()
        assert plan.kept[:, 1].float().mean() == pytest.approx(expected, abs=0.02)
        kept = plan.kept[:, 1]
        # as published: the first choice keeps g1 = p1 / (p1 + p2) whether or not the second one is served
        torch.testing.assert_close(plan.weight[:, 0], torch.full((n,), 1 - p2))
        torch.testing.assert_close(plan.weight[:, 1], torch.where(kept, p2, 0.0))
        assert plan.capacity is None


def test_random_second_in_evaluation() -> None:
    x = log([[0.9, 0.1]]).expand(500, 2)
    assert not limited(x, RandomSecond(), given=signals(500), train=False).kept.all()
    assert limited(x, RandomSecond(when="train"), given=signals(500), train=False).kept.all()
    padding = Signals(valid=torch.arange(500) < 250, seed=1)
    assert limited(x, RandomSecond(), given=padding).kept[250:].all()  # nothing was there to be lost
    with pytest.raises(UserError, match="two choices"):
        limited(torch.zeros(3, 4), RandomSecond(), k=3)


def test_room_rounded_down() -> None:
    """7 units, 1.25 * 7 / 4 = 2.19 places each: 3 rounded up, 2 rounded down."""
    x = torch.zeros(7, 4)
    x[:, 0] = 3.0
    for rounding, room in (("up", 3), ("down", 2)):
        plan = limited(x, Capacity(factor=1.25, min_capacity=1, rounding=rounding), k=1)
        assert load(plan)[0] == room
        assert plan.capacity == room


def test_dropped_second_choices_take_no_room() -> None:
    x = log([[0.9, 0.1]]).expand(40, 2)
    both = RandomSecond(then=Capacity(factor=0.25, min_capacity=1))  # room for 10
    plan = limited(x, both, given=signals(40))
    assert load(plan).tolist() == [10, min(10, int(limited(x, RandomSecond(), given=signals(40)).kept[:, 1].sum()))]
    assert load(plan)[1] < 10 or (plan.kept[:, 1].nonzero().max() > 9)


def test_a_fixed_room_for_every_sequence() -> None:
    """Five units that all want expert 0, in two sequences: two of each have room, whatever the number of units."""
    x = log([[0.8, 0.1, 0.1]] * 5)
    given = Signals(segment=torch.tensor([0, 0, 0, 1, 1]))
    plan = limited(x, FixedCapacity(size=2), k=1, given=given)
    assert plan.kept.tolist() == [[T], [T], [F], [T], [T]]
    assert plan.capacity == 4
    assert limited(x, FixedCapacity(size=2, per="batch"), k=1).kept.tolist() == [[T], [T], [F], [F], [F]]
    padded = Signals(segment=given.segment, valid=torch.tensor([F, T, T, T, T]))
    assert limited(x, FixedCapacity(size=2), k=1, given=padded).kept.all(), "padding takes no room"
    roomy = Signals(segment=given.segment, knobs={"capacity_factor": 3.0})
    assert limited(x, FixedCapacity(size=2), k=1, given=roomy).kept.all()
    with pytest.raises(UserError, match="size must be positive"):
        FixedCapacity(size=0)
