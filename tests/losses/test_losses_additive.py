"""Laws of every loss: sums add up, padding is invisible, gradients are exact, identity is by config."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree

from moestro.core.config import Config
from moestro.core.plan import Dense, ExpertChoice, Plan
from moestro.core.trail import Record, Term, Trail
from moestro.losses import Loss, SwitchBalance, ZLoss, examples

T, E, K = 24, 5, 2
EXAMPLES = examples()
ALL = pytest.mark.parametrize("name", EXAMPLES)


def tensors():
    return {"segment": torch.arange(T) // 6 * 10, "task": torch.arange(T) * 5 // 3 % 2}


def make(logits, rows=slice(None), valid=None, virtual=("null",)):
    """A top-2 plan of the logits [T, E+1] with noise and a null expert; rows: which units."""
    gen = torch.Generator().manual_seed(3)
    noise = torch.randn(logits.shape, generator=gen, dtype=logits.dtype)
    logits, noise = logits[rows.start or 0 : rows.stop], noise[rows]
    probs = logits.softmax(-1)
    expert = torch.topk(logits.detach() + noise, K).indices
    weight = torch.gather(probs, 1, expert)
    if valid is not None:
        valid = valid[rows]
        weight = torch.where(valid[:, None], weight, 0.0)
        expert = torch.where(valid[:, None], expert, -1)
    return Plan(
        expert=expert,
        weight=weight,
        num_experts=E,
        virtual=virtual,
        probs=probs,
        logits=logits,
        valid=valid,
        extra={"noisy_logits": logits + noise * logits.new_full((), 0.5), "noise_std": torch.full_like(noise, 0.5)},
    )


def scores(requires_grad=True):
    gen = torch.Generator().manual_seed(11)
    return torch.randn(T, E + 1, generator=gen, dtype=torch.float64).requires_grad_(requires_grad)


def wanted(loss, rows=slice(None)):
    return {n: tensors()[n][rows] for n in loss.needs}


@ALL
def test_pooled_over_micro_batches_equals_one_batch(name):
    loss = EXAMPLES[name].build()
    valid = torch.ones(T, dtype=torch.bool)
    valid[[3, 4, 5, 20]] = False
    whole = scores()
    one = loss(make(whole, valid=valid), **wanted(loss))
    (want,) = torch.autograd.grad(one, whole)

    pieces = [slice(0, 6), slice(6, 18), slice(18, T)]  # uneven, whole sequences
    split = scores()
    parts = [loss.stats(make(split, s, valid), **wanted(loss, s)) for s in pieces]
    total = (parts[0] + parts[1] + parts[2]).detach()
    torch.testing.assert_close(loss.value(total), one.detach(), rtol=1e-12, atol=1e-14)
    values = [loss.value(part.within(total)) for part in parts]
    for value in values:
        torch.testing.assert_close(value.detach(), one.detach(), rtol=1e-12, atol=1e-14)
    sum(values).backward()
    torch.testing.assert_close(split.grad, want, rtol=1e-9, atol=1e-13)
    assert want.abs().max() > 1e-6
    # a mean of per-micro-batch values is something else for every loss that is no plain mean
    if name not in ("z_loss", "routing_entropy"):
        mean = torch.stack([loss.value(p).detach() for p in parts]).mean()
        assert abs(float(mean - one.detach())) > 1e-6


@ALL
def test_counts_are_int64_and_the_value_a_scalar_of_the_sums(name):
    loss = EXAMPLES[name].build()
    stats = loss.stats(make(scores()), **wanted(loss))
    for value in stats.sums.values():
        assert value.dtype in (torch.int64, torch.float64)
    assert loss.value(stats).shape == ()
    assert loss.value(stats).dtype == torch.float64
    halves = loss.stats(make(scores().detach().float()), **wanted(loss))
    assert {v.dtype for v in halves.sums.values()} <= {torch.int64, torch.float32}
    assert loss(stats) == loss.value(stats)


@ALL
def test_padding_is_invisible_even_where_it_is_nan(name):
    loss = EXAMPLES[name].build()
    base = make(scores(False))
    names = ("weight", "probs", "logits", "noisy_logits", "noise_std")

    def leaves(every):
        """The plan's floating tables as leaves; with every=2 each second unit is padding full of NaN."""
        out = {}
        for n in names:
            table = base.extra[n] if n in base.extra else getattr(base, n)
            # routers promise a weight of 0 at padding, and nothing about the rest
            wide = torch.full((every * T, table.shape[1]), 0.0 if n == "weight" else float("nan"), dtype=torch.float64)
            wide[::every] = table
            out[n] = wide.requires_grad_(True)
        return out

    def value(leaf, every):
        expert = torch.full((every * T, K), 2, dtype=torch.int64)
        expert[::every] = base.expert
        plan = Plan(
            expert=expert,
            weight=leaf["weight"],
            num_experts=E,
            virtual=("null",),
            probs=leaf["probs"],
            logits=leaf["logits"],
            valid=None if every == 1 else torch.arange(every * T) % every == 0,
            extra={n: leaf[n] for n in ("noisy_logits", "noise_std")},
        )
        return loss(plan, **{n: t.repeat_interleave(every) for n, t in wanted(loss).items()})

    plain, padded = leaves(1), leaves(2)
    want, got = value(plain, 1), value(padded, 2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    want.backward()
    got.backward()
    assert any(leaf.grad is not None and leaf.grad.any() for leaf in plain.values())
    for n in names:
        if plain[n].grad is None:
            assert padded[n].grad is None
            continue
        torch.testing.assert_close(padded[n].grad[::2], plain[n].grad, rtol=1e-10, atol=1e-14)
        assert not padded[n].grad[1::2].nan_to_num(nan=1.0).any(), f"padding has a gradient in {n}"


@ALL
def test_gradcheck(name):
    loss = EXAMPLES[name].build()
    torch.manual_seed(0)
    start = scores().detach()
    base = make(start)

    def of(logits):
        probs = logits.softmax(-1)
        weight = torch.gather(probs, 1, base.expert)
        noisy = logits + (base.extra["noisy_logits"] - base.logits)
        extra = {"noisy_logits": noisy, "noise_std": base.extra["noise_std"]}
        return loss(dataclasses.replace(base, probs=probs, logits=logits, weight=weight, extra=extra), **wanted(loss))

    assert torch.autograd.gradcheck(of, start.clone().requires_grad_(True), eps=1e-6, atol=1e-7)


@ALL
def test_nothing_counted_gives_zero_and_a_finite_gradient(name):
    loss = EXAMPLES[name].build()
    logits = scores()
    value = loss(make(logits, valid=torch.zeros(T, dtype=torch.bool)), **wanted(loss))
    assert float(value.detach()) == 0.0
    if value.requires_grad:
        value.backward()
        assert not logits.grad.any()
    empty = loss.stats(make(scores()[:0]), **wanted(loss, slice(0, 0)))
    whole = loss.stats(make(scores()), **wanted(loss))
    torch.testing.assert_close(loss.value(empty + whole), loss.value(whole))


@ALL
def test_autocast_changes_nothing(name):
    loss = EXAMPLES[name].build()
    plan = make(scores(False).float())
    want = loss(plan, **wanted(loss))
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(plan, **wanted(loss))
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@ALL
def test_identity_is_by_config_and_trails_carry_losses(name):
    config = EXAMPLES[name]
    one, same = config.build(), Config.from_dict(config.to_dict()).build()
    other = config.replace(coefficient=config.coefficient + 1).build()
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one.coefficient == config.coefficient
    stats = one.stats(make(scores()), **wanted(one))
    trails = [Trail().under("a") | _trail(loss, stats) for loss in (one, same, other)]
    specs = [_pytree.tree_structure(t) for t in trails]
    assert specs[0] == specs[1]
    assert specs[0] != specs[2]
    stats = stats.detach()
    assert float(_trail(one, stats).loss()) == pytest.approx(one.coefficient * float(one.value(stats)))


def _trail(loss, stats):
    from moestro.core.trail import Key

    return Trail({Key("", 0): Record(terms={loss.name: Term(stats=stats, loss=loss)})})


@pytest.mark.parametrize("name", ["switch_balance", "sequence_balance", "mutual_information", "load_cv2"])
def test_compiled_sums_equal_eager_ones(name):
    loss = EXAMPLES[name].build()
    plan = make(scores(False))
    compiled = torch.compile(lambda p, t: loss(p, **t), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(plan, wanted(loss)), loss(plan, **wanted(loss)))


def test_names_are_unique_and_every_config_has_an_example():
    kinds = {type(c) for c in EXAMPLES.values()}
    assert kinds == set(Loss.__subclasses__())
    names = {type(c): c.build().name for c in EXAMPLES.values()}
    assert len(set(names.values())) == len(names)


def test_entropies_of_other_kinds_of_plan():
    probs = scores(False)[:, :E].softmax(-1)
    dense = Dense(weight=probs, probs=probs, logits=probs.log())
    chosen = ExpertChoice(
        unit=torch.arange(E).reshape(1, E, 1),
        weight=torch.ones(1, E, 1),
        num_units=T,
        probs=probs,
        logits=probs.log(),
    )
    for name in ("z_loss", "routing_entropy", "token_information", "mutual_information"):
        loss = EXAMPLES[name].build()
        torch.testing.assert_close(loss(dense, **wanted(loss)), loss(chosen, **wanted(loss)))


def test_two_losses_meet_in_one_dictionary():
    table = {SwitchBalance().build(): 1, ZLoss().build(): 2}
    assert table[SwitchBalance().build()] == 1


def test_configs_load_no_torch():
    code = "import sys, moestro.losses as l; l.examples(); assert 'torch' not in sys.modules, 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)
