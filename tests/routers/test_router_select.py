"""Select steps, each against choices worked out by hand."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import MissingSignalError, UserError
from moestro.core.plan import Dense, ExpertChoice, Plan
from moestro.core.signals import Signals
from moestro.routers import (
    All,
    Constant,
    ExpertChoiceSelect,
    GroupLimited,
    Gumbel,
    Label,
    LossFree,
    Random,
    Raw,
    Router,
    SoftmaxKept,
    TopK,
    TopP,
    Uniform,
)
from routers.router_cases import E, build, exact, log, rows, signals, units

P4 = [[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]]


def plan_of(select, x, weigh=None, given=None, activation="softmax", train=False, **more) -> Plan:
    router = exact(Router(select=select, weigh=weigh or Raw(), activation=activation, **more), x.shape[1])
    return router.train(train)(x, given or Signals())[0]


def test_top_k() -> None:
    plan = plan_of(TopK(k=3), log(P4))
    assert plan.expert.tolist() == [[1, 3, 2], [0, 1, 2]]
    torch.testing.assert_close(plan.weight, torch.tensor([[0.4, 0.3, 0.2], [0.7, 0.1, 0.1]]))
    assert plan.complete
    plan.check()


def test_top_k_per_call() -> None:
    router = exact(Router(select=TopK(k=3)), 4)
    assert router(log(P4), Signals(knobs={"top_k": 1}))[0].expert.tolist() == [[1], [0]]
    with pytest.raises(UserError, match="top_k 5 is not in 1..4"):
        router(log(P4), Signals(knobs={"top_k": 5}))
    with pytest.raises(UserError, match="top_k 5 is not in 1..4"):
        exact(Router(select=TopK(k=5)), 4)


@pytest.mark.parametrize(("p", "taken"), [(0.4, 1), (0.5, 2), (0.79, 2), (0.81, 3), (1.0, 3), (2.0, 3)])
def test_top_p_takes_the_fewest_that_pass_p(p: float, taken: int) -> None:
    plan = plan_of(TopP(p=p), log([[0.3, 0.5, 0.2]], torch.float64))
    assert plan.expert.tolist() == [([1, 0, 2])[:taken] + [-1] * (3 - taken)]
    torch.testing.assert_close(plan.weight[0, :taken], torch.tensor([0.5, 0.3, 0.2][:taken], dtype=torch.float64))
    assert plan.weight[0, taken:].tolist() == [0] * (3 - taken)
    assert not plan.complete
    plan.check()


def test_top_p_is_monotone_capped_and_set_per_call() -> None:
    router = build(Router(select=TopP(p=0.1), weigh=Raw()))
    x, before = units(200), torch.zeros(200)
    for p in (0.1, 0.3, 0.5, 0.8, 0.99):
        count = (router(x, Signals(knobs={"top_p": p}))[0].expert >= 0).sum(1)
        assert (count >= before).all()
        before = count
    assert before.float().mean() > 4
    capped = build(Router(select=TopP(p=0.99, max_k=3), weigh=Raw()))(x)[0]
    assert capped.expert.shape == (200, 3)
    assert torch.equal(capped.expert, router(x, Signals(knobs={"top_p": 0.99}))[0].expert[:, :3])


def test_top_p_is_strict_to_the_last_bit() -> None:
    """Where p is the very sum of the three highest, in single precision, a fourth expert is taken."""
    router = build(Router(select=TopP(p=0.5), weigh=Raw()))
    for x in units(60):
        mass = router(x[None])[0].probs.detach().sort(descending=True).values.cumsum(1)
        plan, _ = router(x[None], Signals(knobs={"top_p": float(mass[0, 2])}))
        assert (plan.expert >= 0).sum() == 4


def test_expert_choice() -> None:
    # 4 units, 2 experts, factor 1: each expert takes 2 units; expert 0 has a tie between units 1 and 3
    x = log([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.6, 0.4]])
    plan = plan_of(ExpertChoiceSelect(capacity_factor=1.0), x)
    assert isinstance(plan, ExpertChoice)
    assert plan.unit.tolist() == [[[0, 1], [2, 1]]]
    torch.testing.assert_close(plan.weight, torch.tensor([[[0.9, 0.6], [0.7, 0.4]]]))
    assert plan.check().num_units == 4
    more = exact(Router(select=ExpertChoiceSelect(), weigh=Raw()), 2)(x, Signals(knobs={"capacity_factor": 1.5}))[0]
    assert more.unit.tolist() == [[[0, 1, 3], [2, 1, 3]]]


def test_expert_choice_per_segment() -> None:
    # segments 9 (units 0, 2, 3, 5) and 4 (units 1, 4), interleaved; unit 5 is padding; 2 experts, factor 1
    x = log([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3], [0.3, 0.7], [0.99, 0.01]])
    given = Signals(segment=torch.tensor([9, 4, 9, 9, 4, 9]), valid=torch.tensor([True, True, True, True, True, False]))
    plan = plan_of(ExpertChoiceSelect(capacity_factor=1.0, per="segment"), x, given=given).check()
    # segment 4 first (lower number), one unit per expert; segment 9 has 3 units: floor(3 / 2) = 1 per expert
    assert plan.unit.tolist() == [[[4], [1]], [[0], [2]]]
    plan = plan_of(ExpertChoiceSelect(capacity_factor=2.0, per="segment"), x, given=given).check()
    assert plan.unit.tolist() == [[[4, 1, -1], [1, 4, -1]], [[0, 3, 2], [2, 3, 0]]]
    with pytest.raises(MissingSignalError, match="segment"):
        plan_of(ExpertChoiceSelect(per="segment"), x)


def test_every_expert_takes_its_share() -> None:
    plan = build(Router(select=ExpertChoiceSelect(capacity_factor=2.0), weigh=Raw()))(units(40))[0].check()
    assert rows(plan).sum(0).tolist() == [10] * E


def test_label() -> None:
    given = Signals(label=torch.tensor([2, -1, 0]))
    plan = plan_of(Label(), torch.zeros(3, 4), given=given).check()
    assert plan.expert.tolist() == [[2], [-1], [0]]
    assert plan.weight.tolist() == [[0.25], [0.0], [0.25]]
    with pytest.raises(UserError, match=r"names experts 0\.\.4, but there are 0\.\.3"):
        plan_of(Label(), torch.zeros(3, 4), given=Signals(label=torch.tensor([4, 0, 0])))
    with pytest.raises(MissingSignalError, match="task"):
        plan_of(Label(signal="task"), torch.zeros(3, 4), given=given)


def test_random_draws_k_different_experts_equally_often() -> None:
    router = build(Router(score=Uniform(), select=Random(k=3), weigh=Constant()))
    plan = router(units(4000), signals(4000))[0].check()
    assert (plan.expert.sort(1).values.diff(dim=1) > 0).all()
    share = torch.bincount(plan.expert.reshape(-1), minlength=E).double() / 4000
    assert (share - 3 / E).abs().max() < 4 * (3 / E * 5 / E / 4000) ** 0.5
    assert plan.weight.unique().tolist() == [pytest.approx(1 / 3)]
    other = router(units(4000), signals(4000, seed=5))[0]
    assert (other.expert != plan.expert).any(1).float().mean() > 0.5


def test_random_levels() -> None:
    def draws(level: str, **more: object) -> torch.Tensor:
        router = build(Router(score=Uniform(), select=Random(level=level), weigh=Constant()))  # type: ignore[arg-type]
        return router(units(800), signals(800, **more))[0].expert.view(100, 8)

    assert draws("batch").unique().numel() == 1
    assert {int(draws("batch", seed=s).unique()) for s in range(60)} == set(range(E))
    sequence = draws("sequence")
    assert (sequence == sequence[:, :1]).all()
    assert set(sequence[:, 0].tolist()) == set(range(E))
    # numbered by the sequence's first unit, so local segment numbers do not matter; without unit ids they do
    assert torch.equal(draws("sequence", segment=torch.arange(800) // 8 + 77), sequence)
    alone = draws("sequence", unit_id=None)
    assert not torch.equal(draws("sequence", unit_id=None, segment=torch.arange(800) // 8 + 77), alone)
    token = draws("token")
    assert (token != token[:, :1]).any()


def test_random_levels_of_evaluation() -> None:
    """THOR, brief 02: by batch in training, by sentence or token in inference; as released, by position."""

    def draws(training: bool, **more: object) -> torch.Tensor:
        router = build(Router(score=Uniform(), select=Random(level="batch", **more), weigh=Constant()))  # type: ignore[arg-type]
        return router.train(training)(units(800), signals(800))[0].expert.view(100, 8)

    for more in ({"evaluation": "sequence"}, {"evaluation": "token"}, {"evaluation": "sequence", "as_released": True}):
        assert draws(True, **more).unique().numel() == 1
    sentence, token = draws(False, evaluation="sequence"), draws(False, evaluation="token")
    assert (sentence == sentence[:, :1]).all()
    assert sentence[:, 0].unique().numel() == E
    assert (token != token[:, :1]).any()
    released = draws(False, evaluation="sequence", as_released=True)
    assert (released == released[:1]).all()
    assert released[0].unique().numel() > 1
    assert draws(False).unique().numel() == 1
    router = build(Router(score=Uniform(), select=Random(level="sequence", as_released=True), weigh=Constant()))
    with pytest.raises(MissingSignalError, match="position"):
        router(units(8), signals(8, position=None))


def test_gumbel_samples_from_the_distribution() -> None:
    x = log([[0.5, 0.3, 0.15, 0.05]]).expand(20000, 4)
    plan = plan_of(Gumbel(k=2), x, SoftmaxKept(), signals(20000), train=True).check()
    first = torch.bincount(plan.expert[:, 0], minlength=4) / 20000
    torch.testing.assert_close(first, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015, rtol=0)
    # the second without replacement: P(2nd = 0 | 1st = 1) = 0.5 / 0.7
    second = (plan.expert[plan.expert[:, 0] == 1, 1] == 0).float().mean()
    assert second == pytest.approx(0.5 / 0.7, abs=0.02)
    warm = plan_of(Gumbel(k=1), x, given=signals(20000, knobs={"temperature": 0.25}), train=True)
    p0 = 0.5**4 / (0.5**4 + 0.3**4 + 0.15**4 + 0.05**4)
    assert (warm.expert == 0).float().mean() == pytest.approx(p0, abs=0.015)


def test_gumbel_is_top_k_in_evaluation_unless_always() -> None:
    x = log(P4)
    assert plan_of(Gumbel(k=2), x, SoftmaxKept()).expert.tolist() == [[1, 3], [0, 1]]
    many = x.repeat(50, 1)
    assert plan_of(Gumbel(k=2, when="always"), many, SoftmaxKept(), signals(100)).expert.unique(dim=0).shape[0] > 4


def test_all_gives_a_dense_plan() -> None:
    plan = plan_of(All(), log(P4), given=Signals(valid=torch.tensor([True, False]))).check()
    assert isinstance(plan, Dense)
    torch.testing.assert_close(plan.weight, torch.tensor([P4[0], [0.0] * 4]))


def test_groups_by_best_and_by_best_two() -> None:
    # groups (0, 1), (2, 3), (4, 5): best entries 0.30, 0.22, 0.20; best two 0.32, 0.38, 0.30
    x = log([[0.30, 0.02, 0.22, 0.16, 0.20, 0.10]])
    assert plan_of(GroupLimited(groups=3, kept=1, by="max"), x).expert.tolist() == [[0, 1]]
    assert plan_of(GroupLimited(groups=3, kept=1, by="top2"), x).expert.tolist() == [[2, 3]]
    assert plan_of(GroupLimited(groups=3, kept=2, by="max", inner=TopK(k=3)), x).expert.tolist() == [[0, 2, 3]]
    flat = torch.zeros(1, 6)
    assert plan_of(GroupLimited(groups=3, kept=2, inner=TopK(k=4)), flat).expert.tolist() == [[0, 1, 2, 3]]
    p = plan_of(GroupLimited(groups=3, kept=2, by="max", inner=TopP(p=0.9)), x).expert.tolist()
    assert p == [[0, 2, 3, 1, -1, -1]]  # four experts of two groups, and never one from outside


def test_groups_never_give_an_expert_from_outside() -> None:
    router = exact(Router(select=LossFree(inner=GroupLimited(groups=4, kept=1, by="max")), activation="sigmoid"), 8)
    router.select.bias.fill_(-5.0)  # biased scores are all negative: released code would prefer its zeros outside
    plan, _ = router(units(50, 8))
    assert (plan.expert // 2 == plan.expert[:, :1] // 2).all()


def test_impossible_groups() -> None:
    for select in (
        GroupLimited(groups=3),
        GroupLimited(groups=4, kept=1, inner=TopK(k=3)),
        GroupLimited(groups=4, kept=1, inner=Gumbel(k=3)),
        GroupLimited(inner=Label()),
    ):
        with pytest.raises(UserError, match="GroupLimited"):
            build(Router(select=select))
    with pytest.raises(UserError, match="virtual"):
        build(Router(select=GroupLimited(), virtual=("null",)))
    router = build(Router(select=GroupLimited(groups=4, kept=1)))
    with pytest.raises(UserError, match="GroupLimited"):
        router(units(4), Signals(knobs={"top_k": 3}))


def test_bias_changes_the_choice_and_no_weight() -> None:
    router = exact(Router(select=LossFree(inner=TopK(k=2)), weigh=Raw()), 4)
    router.select.bias.copy_(torch.tensor([0.0, -0.15, 0.11, 0.0]))
    plan, _ = router(log(P4))  # 0.1, 0.25, 0.31, 0.3 and 0.7, -0.05, 0.21, 0.1
    assert plan.expert.tolist() == [[2, 3], [0, 2]]
    torch.testing.assert_close(plan.weight, torch.tensor([[0.2, 0.3], [0.7, 0.1]]))
    torch.testing.assert_close(plan.probs, torch.tensor(P4))


def test_bias_step_is_rate_times_sign() -> None:
    router = build(Router(select=LossFree(rate=0.25)), num_experts=4)
    router.step(torch.tensor([10, 7, 3, 8]))  # mean 7
    assert router.select.bias.tolist() == [-0.25, 0.0, 0.25, -0.25]
    router.step(torch.tensor([0, 0, 0, 1]))  # mean 0.25
    assert router.select.bias.tolist() == [0.0, 0.25, 0.5, -0.5]
    big = 2**53  # where a mean in float64 could no longer tell these counts apart
    router.step(torch.tensor([big // 4, big // 4, big // 4 + 1, big // 4 - 1]))
    assert router.select.bias.tolist() == [0.0, 0.25, 0.25, -0.25]
    with pytest.raises(UserError, match=r"\[4\] integer counts"):
        router.step(torch.ones(4))
    with pytest.raises(UserError, match=r"\[4\] integer counts"):
        router.step(torch.ones(3, dtype=torch.int64))


def test_step_balances_a_skewed_router_and_does_nothing_elsewhere() -> None:
    router = build(Router(select=LossFree(rate=0.02), activation="sigmoid", weigh=Raw()))
    x = units(512) + 2.0 * router.score.weight[0].detach()  # expert 0 is everybody's favourite

    def worst() -> float:
        return float(torch.bincount(router(x)[0].expert.reshape(-1), minlength=E).max()) / (512 * 2 / E)

    before = worst()
    for _ in range(60):
        router.step(torch.bincount(router(x)[0].expert.reshape(-1), minlength=E))
    assert before > 2.0
    assert worst() < 1.35
    plain = build("linear")
    state = {n: t.clone() for n, t in plain.state_dict().items()}
    plain.step(torch.arange(E))
    assert all(torch.equal(t, state[n]) for n, t in plain.state_dict().items())


def test_bias_has_no_meaning_to_some_selections() -> None:
    for inner in (TopP(), Gumbel(), Random(), ExpertChoiceSelect(), LossFree()):
        with pytest.raises(UserError, match=r"LossFree\.inner"):
            build(Router(select=LossFree(inner=inner), weigh=Raw()))


def test_deepseek_v3_selection() -> None:
    """Sigmoid scores, bias in groups and experts, the two best of a group, renormalised: against plain Python."""
    select = LossFree(inner=GroupLimited(groups=4, kept=2, inner=TopK(k=3)))
    router = build("loss-free-groups")
    assert router.config.select == select
    router.select.bias.copy_(torch.linspace(-0.2, 0.2, E))
    x = units(64, dtype=torch.float64)
    plan, _ = router(x)
    score = torch.sigmoid(x @ router.score.weight.double().t())
    for t in range(64):
        biased = (score[t] + router.select.bias.double()).tolist()
        worth = [sum(sorted(biased[2 * g : 2 * g + 2])) for g in range(4)]
        groups = sorted(range(4), key=lambda g: (-worth[g], g))[:2]
        best = sorted((e for e in range(E) if e // 2 in groups), key=lambda e: (-biased[e], e))[:3]
        assert plan.expert[t].tolist() == best
        torch.testing.assert_close(plan.weight[t], score[t, best] / score[t, best].sum())
