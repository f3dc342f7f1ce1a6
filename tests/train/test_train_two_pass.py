"""Two passes per batch in training: exact over micro-batches, counted twice, evaluated once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moestro.core.trail import TermKey
from moestro.tasks import NextToken, TwoPass
from moestro.testing.compare import assert_close
from moestro.train.run import run
from moestro.train.stop import Stop
from train.test_train_steps import gradients, grads
from train.train_cases import rows, strong, tiny, with_moe


def two_pass(folder: Any, **changes: Any) -> Any:
    config = with_moe(tiny(folder, objective=TwoPass(alpha=3.0), **changes), **strong())
    return config.replace(model=config.model.replace(dropout=0.1))


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Any, micro_batch: int) -> None:
    results = []
    for size in (0, micro_batch):
        made, model = gradients(two_pass(tmp_path, micro_batch=size), tmp_path)
        results.append((made(0, Stop()), grads(model)))
    (whole, want), (parts, got) = results
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert {key.pass_ for key in whole.terms} == {0, 1}
    for key, value in whole.terms.items():
        assert parts.terms[key] == pytest.approx(value, rel=1e-5)
        assert whole.terms[TermKey(key.path, 1 - key.pass_, key.name)] != value, "the passes draw for themselves"
    for name, grad in want.items():
        assert_close(name, got[name], grad, 1e-4)


def test_both_passes_are_counted(tmp_path: Any) -> None:
    """What steps a router's bias is the demand of both; the number of targets is that of one."""
    found = {}
    for objective in (NextToken(), TwoPass()):
        made, _ = gradients(two_pass(tmp_path).replace(objective=objective), tmp_path)
        found[type(objective)] = made(0, Stop())
    one, two = found[NextToken], found[TwoPass]
    assert one.targets == two.targets
    for path, count in one.counts.items():
        assert int(two.counts[path].sum()) == 2 * int(count.sum())
    assert two.nats > 2 * one.nats * 0.99


def test_a_short_run_evaluates_one_pass(tmp_path: Any) -> None:
    config = two_pass(tmp_path, steps=2, eval_every=2)
    run(config, out=tmp_path / "run")
    (last,) = (r for r in rows(tmp_path / "run", "eval") if r["step"] == 2)
    uniform = torch.log(torch.tensor(float(config.model.vocab_size)))
    assert 0 < last["nats"] < 1.2 * float(uniform)
