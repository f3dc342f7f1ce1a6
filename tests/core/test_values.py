"""Trail, Carry, Signals, Stats: addressing, pooling and errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moestro.core.carry import Carry, Forecast, Live, Replay
from moestro.core.errors import MissingSignalError, UserError
from moestro.core.plan import Plan
from moestro.core.pytree import changed
from moestro.core.signals import Signals
from moestro.core.stats import Stats
from moestro.core.trail import Key, Record, Term, TermKey, Trail, add_stats


@dataclasses.dataclass(frozen=True)
class SquareOfMean:
    """A loss that is not linear in its sums: (sum / count)^2."""

    coefficient: float = 0.5
    name: str = "square"
    needs: tuple[str, ...] = ()

    def stats(self, plan, **tensors):
        raise NotImplementedError

    def value(self, stats: Stats) -> torch.Tensor:
        return (stats["sum"] / stats["count"]) ** 2

    def __call__(self, source, **tensors):
        return self.value(source)


def record(values: torch.Tensor, demand=(1, 2)) -> Record:
    stats = Stats({"sum": values.sum(), "count": torch.tensor(values.numel())})
    return Record(demand=torch.tensor(demand), terms={"square": Term(stats=stats, loss=SquareOfMean())})


def test_paths_are_relative_and_prefixed_by_parents():
    trail = Trail({Key(""): record(torch.ones(2))}).under("ffn").under("layers.3")
    assert list(trail) == [Key("layers.3.ffn", 0)]
    assert trail["layers.3.ffn"].demand is not None
    assert list(trail.as_pass(1)) == [Key("layers.3.ffn", 1)]


def test_the_same_layer_twice_in_one_pass_is_an_error():
    trail = Trail({Key("ffn"): record(torch.ones(2))})
    with pytest.raises(UserError, match="twice in one pass"):
        trail | trail
    assert len(trail | trail.as_pass(1)) == 2
    assert (trail | trail.as_pass(1)).counts()["ffn"].tolist() == [2, 4]


def test_loss_is_the_weighted_sum_and_pooled_gradients_add_up_to_the_whole():
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    whole = Trail({Key("a"): record(x)})
    (want,) = torch.autograd.grad(whole.loss(), x)
    parts = [Trail({Key("a"): record(p)}) for p in x.split([3, 4])]
    totals = add_stats({k: t.stats.detach() for k, t in p.terms().items()} for p in parts)
    got = torch.zeros_like(x)
    for part in parts:
        pooled = part.within(totals)
        torch.testing.assert_close(pooled.loss(), whole.loss())
        got += torch.autograd.grad(pooled.loss(), x, retain_graph=True)[0]
    torch.testing.assert_close(got, want)
    naive = torch.zeros_like(x)
    for part in parts:
        naive += torch.autograd.grad(part.loss(), x, retain_graph=True)[0]
    assert (naive - want).norm() > 1e-3 * want.norm(), "the parts' own losses must not already give the pooled gradient"


def test_stats_refuse_to_mix():
    with pytest.raises(UserError, match="cannot add"):
        Stats({"a": torch.ones(1)}) + Stats({"b": torch.ones(1)})
    assert TermKey("a", 0, "square") in Trail({Key("a"): record(torch.ones(2))}).terms()


def test_detach_cuts_the_graph():
    x = torch.ones(3, requires_grad=True)
    term = Trail({Key("a"): record(x * 2)}).detach().terms()[TermKey("a", 0, "square")]
    assert not term.stats["sum"].requires_grad


def test_carry_shows_children_their_own_and_puts_it_back():
    carry = Carry(own={"layers.0.mixer": 1, "layers.0.ffn": 2, "layers.1.mixer": 3, "layers.10.mixer": 4})
    inner = carry.at("layers.0")
    assert dict(inner.own) == {"mixer": 1, "ffn": 2}
    mixer = inner.at("mixer")
    assert mixer.mine == 1
    back = carry.back("layers.0", inner.back("mixer", mixer.keep(7)))
    assert dict(back.own) == {"layers.0.mixer": 7, "layers.0.ffn": 2, "layers.1.mixer": 3, "layers.10.mixer": 4}
    assert carry.at("layers.1").own == {"mixer": 3}, "layers.1 must not see layers.10"


def test_a_parent_of_many_children_reads_its_carry_once():
    own = {"layers.0.mixer": 1, "layers.0": 2, "layers.1.a.b": 3, "layers.10.mixer": 4, "embed": 5, "layers": 6}
    carry, names = Carry(own=own), ["layers.0", "layers.1", "layers.2", "layers.10"]
    parts = carry.apart(names)
    assert parts == [dict(carry.at(name).own) for name in names]
    assert carry.together(names, parts, carry).own == own
    parts[1], parts[2] = {}, {"new": 7, "": 8}
    one_by_one = carry
    for name, part in zip(names, parts):
        one_by_one = one_by_one.back(name, dataclasses.replace(one_by_one.at(name), own=part))
    stream = Carry().with_state("r", 9)
    after = carry.together(names, parts, stream)
    assert after.own == one_by_one.own
    assert after.state == {"r": 9}
    assert carry.own == own
    assert carry.put("embed", 1).own == carry.back("embed", carry.at("embed").keep(1)).own


@pytest.mark.parametrize(
    "value", [Signals(seed=3, knobs={"top_k": 1}), Carry(state={"a": 1})], ids=["signals", "carry"]
)
def test_a_changed_value_is_a_replaced_one(value):
    name = "seed" if isinstance(value, Signals) else "own"
    made = changed(value, **{name: {"x": 2}})
    assert made == dataclasses.replace(value, **{name: {"x": 2}})
    assert type(made) is type(value)
    assert getattr(value, name) != {"x": 2}
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, name, 1)


def test_the_stream_flows_and_plans_ahead_come_nearer():
    plan = Plan(expert=torch.zeros(1, 1, dtype=torch.int64), weight=torch.ones(1, 1), num_experts=1)
    carry = Carry().with_state("r", 5).give(1, Live(plan))
    first, carry = carry.take()
    assert first is None
    second, carry = carry.take()
    assert isinstance(second, Live)
    assert not carry.ahead
    assert carry.state["r"] == 5
    assert Carry().at("x").back("x", Carry().give(0, Forecast())).ahead
    assert Replay(plan).plan is plan


def test_signals_fold_the_seed_and_name_what_is_missing():
    signals = Signals(seed=1, valid=torch.ones(2, dtype=torch.bool), knobs={"top_k": 4})
    assert signals.at("a").at("b").seed != signals.at("b").at("a").seed
    assert signals.knob("top_k", 2) == 4
    assert signals.knob("top_p", 0.4) == 0.4
    with pytest.raises(MissingSignalError, match=r"sequence balance needs the signal segment.*given: valid"):
        signals.require(("valid", "segment"), "sequence balance")
