"""Runs with experts weights averaging (48): trained, saved, resumed to the bit, and made dense again."""

from __future__ import annotations

import pytest
import torch

from moestro.convert.config import Average
from moestro.experts import Gated
from moestro.moe.config import AveragedExperts
from moestro.optim import ExpertAveraging
from moestro.train.load import load
from moestro.train.run import run
from train.train_cases import Steps, rows, tiny


class Died(Exception):
    """Stands for a crash."""


def averaged(place, **changes):
    config = tiny(place, steps=6, eval_every=3, **changes)
    layer = AveragedExperts(num_experts=3, experts=Gated(width=24))
    return config.replace(model=config.model.replace(moe=layer))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("averaging")


@pytest.fixture(scope="module")
def whole(place):
    """A run of six steps."""
    assert run(averaged(place, after=(ExpertAveraging(share=0.3),)), out=place / "whole").complete
    return place / "whole"


def crash(info):
    if info.step == 5:
        raise Died


def spread(folder):
    """How far experts lie from their mean, over all layers."""
    state = load(folder, state="last").model.state_dict()
    banks = [t for n, t in state.items() if ".experts." in n]
    assert banks
    return sum(float((t - t.mean(0)).square().sum()) for t in banks)


def test_it_trains_resumes_and_becomes_dense(place, whole):
    config = averaged(place, after=(ExpertAveraging(share=0.3),))
    with pytest.raises(Died):
        run(config, out=place / "cut", progress=Steps(crash))
    assert run(out=place / "cut", resume=True).complete
    assert rows(place / "cut") == rows(whole)
    first, second = (load(folder, state="last").model.state_dict() for folder in (whole, place / "cut"))
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    run(averaged(place), out=place / "alone")
    assert spread(whole) < 0.5 * spread(place / "alone")

    found = load(whole)
    assert found.config.after == (ExpertAveraging(share=0.3),)
    text = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    dense, receipt = Average().build(found.model, text=text)
    assert receipt.bound == 1e-6
    assert receipt.params_after == dense.config.num_params()
    assert dense.config.moe is None
    assert dense.config.num_params() == config.model.replace(moe=None, ffn=dense.config.ffn).num_params()
    assert sorted(dense.state_dict()) == sorted(dense.config.build().state_dict())


def test_a_run_without_averaging_in_the_resumed_half_would_show(place, whole, monkeypatch):
    from moestro.optim.averaging import ExpertAveraging as Hook

    config = averaged(place, after=(ExpertAveraging(share=0.3),))
    with pytest.raises(Died):
        run(config, out=place / "lost", progress=Steps(crash))
    monkeypatch.setattr(Hook, "__call__", lambda self, step, counts: None)
    run(out=place / "lost", resume=True)
    assert spread(place / "lost") > 1.05 * spread(whole)
