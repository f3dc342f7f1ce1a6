"""The composite: order of steps, mixing, subsets, virtual ids, signals, configs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from moestro.core.carry import Carry
from moestro.core.config import config
from moestro.core.draws import normal
from moestro.core.errors import MissingSignalError, UserError
from moestro.core.signals import Signals
from moestro.routers import AnyRouter, FixedNoise, Label, Linear, LossFree, Mix, Raw, Router, Score, TopK
from moestro.routers.score import LinearScore
from moestro.routers.steps import MixStep, Scores
from moestro.routers.subset import ABSENT_LOGIT
from moestro.testing.attend import Map
from routers.router_cases import DIM, EXAMPLES, E, build, exact, log, signals, units

# Steps of later systems: they must fit the signatures as they are -------------------------------------------------


@config
class Similarity(Mix):
    """rbar = S r with S = softmax over earlier units (arXiv 2505.00792)."""

    builds = f"{__name__}:SimilarityMix"  # type: ignore[misc]


@config
class Attended(Mix):
    """rbar = A r with A the preceding attention."""

    builds = f"{__name__}:AttendedMix"  # type: ignore[misc]


@config
class Averaged(Score):
    """Logits that add the previous layer's (ZAYA1's depth averaging)."""

    builds = f"{__name__}:AveragedScore"  # type: ignore[misc]


class SimilarityMix(MixStep):
    def __init__(self, config: Similarity, dim: int, num_ids: int) -> None:
        super().__init__()

    def forward(self, scores: Scores, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        seen = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril()
        similar = (x @ x.t()).masked_fill(~seen, float("-inf")).softmax(-1)
        return dataclasses.replace(scores, probs=similar @ scores.probs), carry


class AttendedMix(MixStep):
    needs = ("attend",)

    def __init__(self, config: Attended, dim: int, num_ids: int) -> None:
        super().__init__()

    def forward(self, scores: Scores, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        assert signals.attend is not None
        return dataclasses.replace(scores, probs=signals.attend(scores.probs)), carry


class AveragedScore(LinearScore):
    def __init__(self, config: Averaged, dim: int, num_ids: int) -> None:
        super().__init__(Linear(), dim, num_ids)

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        scores, carry = super().forward(x, signals, carry)
        total = scores.logits + carry.state.get("router", 0.0)
        return dataclasses.replace(scores, logits=total), carry.with_state("router", total)


def test_mixing_comes_between_probabilities_and_selection() -> None:
    router = exact(Router(mix=Attended(), weigh=Raw(), select=TopK(k=1)), 3)
    x = log([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    swap = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    plan, _ = router(x, Signals(attend=lambda v: swap @ v))
    torch.testing.assert_close(plan.probs, torch.tensor([[0.1, 0.2, 0.7], [0.35, 0.25, 0.4]]))
    torch.testing.assert_close(plan.extra["unmixed_probs"], x.softmax(-1))
    torch.testing.assert_close(plan.logits, x)
    assert plan.expert.tolist() == [[2], [2]]
    torch.testing.assert_close(plan.weight, torch.tensor([[0.7], [0.4]]))
    with pytest.raises(MissingSignalError, match="attend"):
        router(x)


def test_mixing_with_the_identity_is_no_mixing() -> None:
    x = units(10)
    plain, mixed = build("linear"), build(Router(mix=Attended()))
    a, b = plain(x)[0], mixed(x, Signals(attend=lambda v: v))[0]
    assert torch.equal(a.expert, b.expert)
    assert torch.equal(a.weight, b.weight)


def test_similarity_of_units_is_differentiable_and_causal() -> None:
    router, x = build(Router(mix=Similarity())), units(12).requires_grad_()
    plan, _ = router(x)
    torch.testing.assert_close(plan.probs.sum(1), torch.ones(12))
    plan.weight[7].square().sum().backward()
    assert x.grad is not None
    assert x.grad[:8].abs().sum(1).min() > 0
    assert x.grad[8:].abs().sum() == 0


def test_state_flows_from_layer_to_layer() -> None:
    first, second = build(Router(score=Averaged())), build(Router(score=Averaged()), seed=1)
    x = units(6)
    a, carry = first(x)
    b, after = second(x, None, carry)
    torch.testing.assert_close(b.logits, a.logits + x @ second.score.weight.t())
    assert after.state["router"] is b.logits
    b.weight.square().sum().backward()
    assert first.score.weight.grad.abs().sum() > 0


# Subsets and virtual ids ------------------------------------------------------------------------------------------


def test_a_subset_is_a_small_router_with_the_banks_numbers() -> None:
    ids = (6, 1, 4)
    wide, small = build(Router(subset=ids)), build(Router(), num_experts=3)
    x = units(30)
    a, b = wide(x)[0].check(), small(x)[0]
    assert a.num_experts == E
    assert torch.equal(a.expert, torch.tensor(ids)[b.expert])
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.probs[:, list(ids)], b.probs)
    assert torch.equal(a.logits[:, list(ids)], b.logits)
    rest = [e for e in range(E) if e not in ids]
    assert a.probs[:, rest].abs().sum() == 0
    assert a.logits[:, rest].unique().tolist() == [ABSENT_LOGIT]
    torch.testing.assert_close(a.logits.logsumexp(1), b.logits.logsumexp(1))
    a.probs.square().sum().backward()
    b.probs.square().sum().backward()
    torch.testing.assert_close(wide.score.weight.grad, small.score.weight.grad)


def test_noise_of_a_subset_is_given_for_the_whole_bank() -> None:
    plan, _ = build(Router(score=FixedNoise(std=0.5), subset=(6, 1, 4)))(units(5))
    noisy, std = plan.extra["noisy_logits"], plan.extra["noise_std"]
    assert noisy.shape == std.shape == plan.logits.shape
    assert noisy[:, [0, 2, 3, 5, 7]].unique().tolist() == [ABSENT_LOGIT]
    assert std.unique().tolist() == [0.5, 1.0]
    draw = normal(Signals().at("score").seed, torch.arange(5), 3)
    torch.testing.assert_close((noisy - plan.logits)[:, [6, 1, 4]], 0.5 * draw)


def test_a_subset_steps_on_its_own_counts() -> None:
    router = build(Router(select=LossFree(rate=1.0), subset=(5, 0)))
    router.step(torch.tensor([3, 90, 90, 90, 90, 9, 90, 90]))
    assert router.select.bias.tolist() == [-1.0, 1.0]


def test_impossible_subsets() -> None:
    for ids in ((), (1, 1), (0, 8), (-1,)):
        with pytest.raises(UserError, match="subset"):
            build(Router(subset=ids))
    with pytest.raises(UserError, match=r"top_k 2 is not in 1\.\.1"):
        build(Router(subset=(3,)))


def test_virtual_ids_take_part() -> None:
    router = exact(Router(virtual=("null", "copy"), weigh=Raw(), subset=(2, 0)), 4)
    plan = router(torch.tensor([[0.0, 0.0, 5.0, 4.0], [3.0, 0.0, 4.0, 0.0]]))[0].check()
    assert plan.expert.tolist() == [[4, 5], [4, 2]]  # null is 4, copy is 5, local 0 is expert 2 of the bank
    assert plan.probs.shape == (2, 6)
    assert plan.virtual == ("null", "copy")
    assert plan.routed().tolist() == [[False, False], [False, True]]
    assert plan.weight.min() > 0
    for name in ("all", "expert-choice"):
        with pytest.raises(UserError, match="virtual"):
            build(EXAMPLES[name].replace(virtual=("null",)))


# Signals and shapes -----------------------------------------------------------------------------------------------


def test_needs_are_the_union_and_missing_ones_are_named() -> None:
    router = build(Router(select=Label(signal="task"), mix=Attended(), weigh=Raw()))
    assert set(router.needs) == {"task", "attend"}
    with pytest.raises(MissingSignalError, match=r"task.*given: label"):
        router(units(4), Signals(label=torch.zeros(4, dtype=torch.int64), attend=lambda v: v))
    for name in EXAMPLES:
        need = build(name).needs
        if need:
            with pytest.raises(MissingSignalError, match=need[0]):
                build(name)(units(4), Signals())


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(UserError, match=r"\[T, D\]"):
        build("linear")(torch.zeros(2, 3, DIM))
    with pytest.raises(UserError, match=r"signals\.valid has 3 entries for 4 units"):
        build("linear")(units(4), Signals(valid=torch.ones(3, dtype=torch.bool)))
    with pytest.raises(UserError, match=r"signals\.label has 3 entries for 4 units"):
        build("label")(units(4), Signals(label=torch.zeros(3, dtype=torch.int64)))


def test_temperature_per_call_and_as_a_tensor() -> None:
    x = units(6)
    cool = build("linear-cool")(x)[0]
    for value in (0.5, torch.tensor(0.5)):
        knob = build(EXAMPLES["linear-cool"].replace(temperature=1.0))(x, Signals(knobs={"temperature": value}))[0]
        torch.testing.assert_close(knob.probs, cool.probs)


def test_limits_without_meaning_are_refused() -> None:
    for name in ("all", "expert-choice"):
        with pytest.raises(UserError, match="needs no limit"):
            build(EXAMPLES[name].replace(limit=EXAMPLES["capacity"].limit))


@pytest.mark.parametrize("name", EXAMPLES)
def test_top_k_bounds_the_choices(name: str) -> None:
    router = build(name)
    plan, _ = router(units(20), signals(20))
    if router.select.makes == "Plan":
        assert plan.expert.shape[1] == router.top_k


def test_meta_tensors_pass_through() -> None:
    with torch.device("meta"):
        for name, example in EXAMPLES.items():
            if "segment" not in build_needs(name):
                router = example.build(dim=DIM, num_experts=E)
                needed = {n: torch.empty(6, dtype=torch.int64) for n in router.needs if n != "attend"}
                given = Signals(**needed, attend=Map(torch.empty(6, 6)))
                assert router(torch.empty(6, DIM), given)[0].weight.is_meta, name


def build_needs(name: str) -> tuple[str, ...]:
    with torch.device("cpu"):
        return build(name).needs


# Configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_configs_travel_as_json(name: str) -> None:
    assert AnyRouter.from_dict(json.loads(json.dumps(EXAMPLES[name].to_dict()))) == EXAMPLES[name]


def test_values_are_checked() -> None:
    bad = [
        ("routers.TopK", {"k": 0}),
        ("routers.TopP", {"p": 0.0}),
        ("routers.Cosine", {"scale": 200.0}),
        ("routers.Capacity", {"factor": -1.0}),
        ("routers.Capacity", {"min_capacity": -1}),
        ("routers.GroupLimited", {"groups": 2, "kept": 3}),
        ("routers.RandomSecond", {"threshold": 0.0}),
        ("routers.Recycle", {"order": {"type": "routers.Recycle"}}),
        ("routers.Router", {"temperature": 0.0}),
    ]
    from moestro.core.config import Config

    for kind, fields in bad:
        with pytest.raises(UserError):
            Config.from_dict({"type": kind, **fields})


def test_examples_load_no_torch() -> None:
    code = "import sys; from moestro.routers import examples; assert examples(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
