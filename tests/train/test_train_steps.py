"""One step: exact over micro-batches, losses that must reach backward, counts that only training makes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.losses import SequenceBalance, SwitchBalance
from moestro.routers import Router, TopK
from moestro.tasks.batches import Batches
from moestro.tasks.corpus import prepare
from moestro.tasks.tokenizer import Bytes
from moestro.testing.compare import assert_close
from moestro.train.evaluate import evaluate
from moestro.train.ranks import Ranks
from moestro.train.run import run
from moestro.train.step import Gradients
from moestro.train.stop import Stop
from moestro.train.terms import declared
from train.train_cases import Steps, rows, strong, tiny, with_moe


def gradients(config, folder, model=None):
    """(Gradients of a fresh model, the model)."""
    corpus = prepare(config.data.build(), Bytes(), folder / "cache")
    model = config.model.build() if model is None else model
    batches = Batches(corpus, config.seq_len, config.seed)
    return Gradients(model, config.objective.build(), batches, config, Ranks()), model


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(config, folder):
    made, model = gradients(config, folder)
    found = made(0, Stop())
    return found, grads(model)


def far(a, b):
    """The largest relative distance of two gradients, parameter by parameter."""
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in b)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5])
def test_micro_batches_give_the_loss_counts_and_gradient_of_the_whole_batch(tmp_path, micro_batch):
    config = with_moe(tiny(tmp_path), **strong())
    whole, want = one_step(config, tmp_path)
    parts, got = one_step(config.replace(micro_batch=micro_batch), tmp_path)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert {k: c.tolist() for k, c in parts.counts.items()} == {k: c.tolist() for k, c in whole.counts.items()}
    assert parts.terms.keys() == whole.terms.keys()
    for key, value in whole.terms.items():
        assert parts.terms[key] == pytest.approx(value, rel=1e-5)
    for name, grad in want.items():
        assert_close(name, got[name], grad, 1e-5)


def test_balance_inside_micro_batches_is_another_loss_and_says_so(tmp_path):
    config = with_moe(tiny(tmp_path), **strong())
    _, want = one_step(config, tmp_path)
    naive = config.replace(micro_batch=1, balance_over="micro_batch")
    found, got = one_step(naive, tmp_path)
    assert far(got, want) > 1e-2  # what the exact way must not be
    # ... and it is exactly the mean over micro-batches of (nats + coefficient * their own balance loss)
    made, model = gradients(config, tmp_path)
    corpus = made.batches
    total = 0.0
    for i in range(config.batch_size):
        batch = corpus.train(0, config.batch_size, i, i + 1)
        outcome = config.objective.build()(model, batch, Signals())
        part = (outcome.loss / config.seq_len + outcome.trail.loss()) / config.batch_size
        part.backward()
        total += float(part.detach())
    assert found.loss == pytest.approx(total, rel=1e-6)
    for name, grad in grads(model).items():
        assert_close(name, got[name], grad, 1e-5)


def test_losses_inside_sequences_are_exact_too(tmp_path):
    config = with_moe(tiny(tmp_path), losses=(SequenceBalance(coefficient=1.0),))
    whole, want = one_step(config, tmp_path)
    parts, got = one_step(config.replace(micro_batch=2), tmp_path)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    for name, grad in want.items():
        assert_close(name, got[name], grad, 1e-5)


def test_the_counting_pass_is_only_made_where_it_is_needed(tmp_path, monkeypatch):
    for coefficient, passes in ((1.0, 5), (0.0, 3)):
        config = with_moe(tiny(tmp_path), **strong(coefficient)).replace(micro_batch=2)
        made, model = gradients(config, tmp_path)
        seen = []
        monkeypatch.setattr(model, "loss", lambda *a, f=model.loss, s=seen: s.append(1) or f(*a))
        made(0, Stop())
        assert len(seen) == passes  # three micro-batches; with a balance loss two of them are counted first


def test_the_seed_of_draws_depends_on_the_step_and_not_on_the_pass(tmp_path):
    seeds = []

    def spy(model, batch, signals):
        seeds.append(signals.seed)
        return objective(model, batch, signals)

    config = with_moe(tiny(tmp_path), **strong()).replace(micro_batch=3)
    made, _ = gradients(config, tmp_path)
    objective, made.objective = made.objective, spy
    spy.count = objective.count
    made(0, Stop())
    made(1, Stop())
    assert len(set(seeds[:3])) == 1
    assert len(set(seeds)) == 2


# Coefficients that never reach backward ---------------------------------------------------------------------------


def detached(layer):
    """The layer's losses see probabilities cut from the graph: their values are right, their gradient is missing."""
    loss = layer.losses[0]
    stats = loss.stats

    def cut(plan, **tensors):
        return stats(plan, **tensors).detach()

    loss.stats = cut


def test_a_loss_without_gradient_is_an_error_that_names_it(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    made, model = gradients(config, tmp_path)
    detached(model.layers[1].ffn)
    made(0, Stop())
    with pytest.raises(UserError, match=r"never reached the backward pass: load_balancing_loss of layers\.1\.ffn\."):
        made.reach.check()


def test_a_lost_trail_is_an_error_that_names_its_layer(tmp_path):
    config = tiny(tmp_path)
    made, model = gradients(config, tmp_path)
    inner = model.layers[0].forward
    model.layers[0].forward = lambda h, s, c: (*inner(h, s, c)[:2], type(inner(h, s, c)[2])())
    made(0, Stop())
    with pytest.raises(UserError, match=r"load_balancing_loss of layers\.0\.ffn"):
        made.reach.check()


def test_the_trainer_stops_after_the_first_step_without_saving_anything_new(tmp_path, monkeypatch):
    from moestro.moe import layer

    true = layer.note

    def naive(plan, losses, signals, training, where):
        return true(plan, losses, signals, training, where).detach()

    monkeypatch.setattr(layer, "note", naive)
    with pytest.raises(UserError, match="never reached the backward pass"):
        run(tiny(tmp_path), out=tmp_path / "run")
    assert rows(tmp_path / "run") == []


def test_frozen_routers_are_free_not_to_be_reached(tmp_path):
    config = tiny(tmp_path)
    model = config.model.build()
    for name, p in model.named_parameters():
        if ".router." in name or name.startswith(("embed", "layers.0")):
            p.requires_grad_(False)
    assert declared(model) == []
    made, _ = gradients(config, tmp_path, model)
    made(0, Stop())
    made.reach.check()


def test_a_coefficient_of_zero_asks_for_nothing(tmp_path):
    assert declared(with_moe(tiny(tmp_path), losses=(SwitchBalance(coefficient=0.0),)).model.build()) == []
    assert len(declared(tiny(tmp_path).model.build())) == 2


# Counts -----------------------------------------------------------------------------------------------------------


def test_routers_with_a_state_step_once_per_optimiser_step_with_exact_counts(tmp_path):
    from moestro.routers import LossFree

    router = Router(activation="sigmoid", select=LossFree(inner=TopK(k=2), rate=0.01))
    config = with_moe(tiny(tmp_path), router=router).replace(steps=6, eval_every=2)
    whole, parts = Steps(), Steps()
    run(config, out=tmp_path / "a", progress=whole)
    run(config.replace(micro_batch=2), out=tmp_path / "b", progress=parts)
    for a, b in zip(whole.infos, parts.infos):
        assert {k: c.tolist() for k, c in a.counts.items()} == {k: c.tolist() for k, c in b.counts.items()}
        assert all(int(c.sum()) == 2 * config.batch_size * config.seq_len for c in a.counts.values())
        assert all(c.dtype == torch.int64 for c in a.counts.values())


def test_evaluation_changes_nothing(tmp_path):
    config = tiny(tmp_path)
    made, model = gradients(config, tmp_path)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    first = evaluate(model, made.objective, made.batches, config, Ranks())
    again = evaluate(model, made.objective, made.batches, config, Ranks())
    assert model.training
    assert first.nats == again.nats
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert first.bits_per_byte == pytest.approx(first.nats / 0.6931471805599453)
    assert first.tokens == 8 * 16
    for layer in first.layers.values():
        assert sum(layer["load"]) == 2 * first.tokens
        assert 0 < layer["routing_entropy"] <= 1.3863


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(tmp_path):
    good = tiny(tmp_path, steps=12, eval_every=4)
    out = tmp_path / "run"

    def poison(info):
        if info.step == 6:
            with torch.no_grad():
                models[0].layers[1].ffn.router.score.weight.fill_(float("nan"))

    from moestro.train import arm

    models = []
    init = arm.Arm.__init__

    def spy(self, *args, **kwargs):
        init(self, *args, **kwargs)
        models.append(self.model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arm.Arm, "__init__", spy)
        with pytest.raises(
            UserError,
            match=r"loss of step 7 is not finite.*load_balancing_loss of layers.1.ffn nan.*Last good state: step 4",
        ):
            run(good, out=out, progress=Steps(poison))
    assert [r["step"] for r in rows(out, "step")] == [1, 2, 3, 4, 5, 6]
    result = run(out=out, resume=True)  # from step 4, with the weights that were saved there
    assert result.complete
    run(good, out=tmp_path / "clean")
    assert rows(out) == rows(tmp_path / "clean")


def test_an_expert_that_starves_is_named_in_log_and_messages(tmp_path):
    config = tiny(tmp_path, steps=8, starved_after=3)
    seen = Steps()
    with pytest.MonkeyPatch.context() as patch:
        from moestro.train.step import Gradients as Made

        true = Made.__call__

        def starve(self, step, stop):
            found = true(self, step, stop)
            for counts in found.counts.values():
                counts[1] = 0
            return found

        patch.setattr(Made, "__call__", starve)
        run(config, out=tmp_path / "run", progress=seen)
    starved = rows(tmp_path / "run", "starved")
    assert {r["path"] for r in starved} == {"layers.0.ffn", "layers.1.ffn"}
    assert all(r["step"] == 3 and r["experts"] == [1] for r in starved)
    assert any("no token went to expert 1 of layers.1.ffn for 3 steps" in line for line in seen.said)


def test_top_k_reaches_the_steps(tmp_path):
    config = with_moe(tiny(tmp_path), router=Router(select=TopK(k=3)))
    found, _ = one_step(config, tmp_path)
    assert all(int(c.sum()) == 3 * config.batch_size * config.seq_len for c in found.counts.values())
    assert dataclasses.asdict(config.model)["dim"] == 16
