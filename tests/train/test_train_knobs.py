"""Schedules of knobs by hand (41, calculate_gate_number), in a run, and evaluation over several numbers of experts."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.core.errors import UserError
from moestro.optim.config import WSD
from moestro.routers import Frozen, Router, SoftmaxKept, TopK, TopP
from moestro.trace.read import read
from moestro.trace.spending import mean_experts
from moestro.train.config import CosineRamp, ExponentialRamp, LinearRamp, Staircase, TrainRun
from moestro.train.held_out import held_out
from moestro.train.knobs import knobs_at
from moestro.train.layout import Layout
from moestro.train.load import load
from moestro.train.run import run
from moestro.train.save import Store
from moestro.train.settings import check
from moestro.train.step import signals_of
from moestro.train.sweep import check_knobs, evaluate_over, validate_over
from train.train_cases import rows, tiny, with_moe


def of(knob, steps, *at):
    return [knob.value(t, steps) for t in at]


def test_linear_increase_and_decrease():
    """round((Kmax - Kmin) t/T) + Kmin: 8, 12, 16 at 0, T/2, T; round((Kmin - Kmax) t/T) + Kmax: 16, 12, 8."""
    assert of(LinearRamp(start=8, end=16), 1000, 0, 500, 1000) == [8, 12, 16]
    assert of(LinearRamp(start=16, end=8), 1000, 0, 500, 1000) == [16, 12, 8]
    # half to even, of what is added: 8 * 1/16 = 0.5 -> 0, 8 * 3/16 = 1.5 -> 2
    assert of(LinearRamp(start=7, end=15), 16, 1, 2, 3) == [7, 8, 9]
    assert all(type(k) is int for k in of(LinearRamp(start=8, end=16), 10, 0, 3, 10))


def test_cosine_increase_and_decrease():
    """round((Kmin - Kmax) cos(pi t / 2T)) + Kmax: 16 - round(8 cos(pi/4)) = 16 - 6 = 10 in the middle."""
    assert of(CosineRamp(start=8, end=16), 100, 0, 50, 100) == [8, 10, 16]
    assert of(CosineRamp(start=16, end=8), 100, 0, 50, 100) == [16, 14, 8]


def test_exponential_increase():
    """round((Kmin - Kmax) 0.99^(t // (T // 300))) + Kmax; below 300 steps the exponent goes on in larger steps."""
    knob, T = ExponentialRamp(start=8, end=16), 600
    assert of(knob, T, *range(0, T + 1, 7)) == [16 + round(-8 * 0.99 ** (t // (T // 300))) for t in range(0, T + 1, 7)]
    assert of(knob, 3, 0, 1, 3) == [8, 16 - round(8 * 0.99**100), 16 - round(8 * 0.99**300)]


def test_multi_step():
    """[1, 2, 4, 8, 16] indexed by floor(5 t / T)."""
    knob = Staircase()
    assert of(knob, 10, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10) == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 16]


def test_other_knobs_are_not_rounded():
    assert of(LinearRamp(name="top_p", start=0.8, end=0.4), 4, 0, 1, 4) == pytest.approx([0.8, 0.7, 0.4])
    knobs = (LinearRamp(), Staircase(name="top_p", values=(0.5,)))
    assert knobs_at(knobs, 5, 10) == {"top_k": 12, "top_p": 0.5}


def test_mean_active_share_of_smoe_dropout():
    """8 -> 16 of 16: 75 percent of the experts' FLOPs of a dense training."""
    assert LinearRamp(start=8, end=16).mean(4000) / 16 == pytest.approx(0.75, abs=1e-3)


def test_impossible_values_are_refused():
    for bad in (lambda: LinearRamp(start=0), lambda: Staircase(values=()), lambda: LinearRamp(end=math.inf)):
        with pytest.raises(UserError):
            bad()
    with pytest.raises(UserError, match="top_k must be whole"):
        LinearRamp(start=1.5)
    with pytest.raises(UserError, match="top_k has 2 schedules"):
        TrainRun(knobs=(LinearRamp(), Staircase()))


def dropping(folder, **changes):
    """SMoE-Dropout, small: a frozen router over four experts, K from 2 to 4."""
    router = Router(score=Frozen(), select=TopK(k=4), weigh=SoftmaxKept())
    made = with_moe(tiny(folder), router=router, num_experts=4, losses=())
    return made.replace(knobs=(LinearRamp(start=2, end=4),), **changes)


def test_a_run_with_a_growing_number_of_experts(tmp_path):
    """Every step chooses K experts per token as scheduled; the frozen router keeps every bit; evaluation uses all."""
    config = dropping(tmp_path, steps=6, eval_every=3)
    assert signals_of(config, 3).knobs == {"top_k": 3}
    done = run(config, out=tmp_path / "run")
    assert done.complete
    steps = rows(tmp_path / "run", "step")
    assert [r["knobs"]["top_k"] for r in steps] == [2, 2, 3, 3, 3, 4]
    loaded = load(tmp_path / "run")
    assert recorded(tmp_path / "run") == [r["knobs"]["top_k"] for r in steps]
    (first, *_) = [p for n, p in loaded.model.named_parameters() if n.endswith("router.score.inner.weight")]
    untrained = dict(loaded.config.model.build().named_parameters())
    assert any(torch.equal(first, p) for p in untrained.values())
    batches = held_out(loaded)
    found = validate_over(loaded, batches, [1, 2, 4])
    assert list(found) == [1, 2, 4]
    assert found[4] == rows(tmp_path / "run", "eval")[-1]["bits_per_byte"]
    assert len(set(found.values())) == 3
    full = evaluate_over(loaded.model, config.objective.build(), batches, loaded.config, [1, 4])
    for k, one in full.items():
        assert all(sum(layer["load"]) == k * one.tokens for layer in one.layers.values())
    with pytest.raises(UserError, match="can choose 1 to 4 experts"):
        validate_over(loaded, batches, [8])


def recorded(folder):
    """Mean experts per token of every recorded step, from the last state."""
    store = Store.open(Layout(folder))
    assert store is not None
    path = store.state_file("trace.safetensors")
    assert path is not None
    return mean_experts(read(path))[:, 0].tolist()


def test_knobs_that_nobody_reads_or_that_ask_for_too_much(tmp_path):
    config = dropping(tmp_path)
    model = config.model.build()
    with pytest.raises(UserError, match="no router of this model reads the knob top_p; they read top_k, temperature"):
        check_knobs((LinearRamp(name="top_p", start=0.4, end=0.8),), model, 10)
    with pytest.raises(UserError, match=r"from 2 to 5, but layers.*can choose 1 to 4 experts"):
        run(config.replace(knobs=(LinearRamp(start=2, end=5),)), out=tmp_path / "bad")
    harder = with_moe(config, router=Router(select=TopP())).model.build()
    check_knobs((LinearRamp(name="top_p", start=0.4, end=0.8),), harder, 10)


def test_resuming_with_another_length_changes_the_schedule(tmp_path):
    config = dropping(tmp_path)
    constant = config.replace(knobs=(Staircase(values=(2.0,)),))
    for one, fits in ((config, False), (constant, True)):
        old = one.replace(optimizer=one.optimizer.replace(schedule=WSD(warmup=0.0, decay=0.0)))
        if fits:
            assert [c[0] for c in check(old, old.replace(steps=24), 9)] == ["steps"]
        else:
            with pytest.raises(UserError, match="another run: steps"):
                check(old, old.replace(steps=24), 9)


def test_a_run_with_knobs_survives_writing(tmp_path):
    config = dropping(tmp_path)
    assert TrainRun.from_dict(config.to_dict()) == config
