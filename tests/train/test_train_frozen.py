"""Runs in which parts of the model stay as they are."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import UserError
from moestro.train.load import load
from moestro.train.run import run
from train.train_cases import tiny


def test_frozen_parts_of_a_run_keep_every_bit_and_have_no_state(tmp_path):
    config = tiny(tmp_path, frozen=("embed", "0"), steps=4, eval_every=4)
    run(config, out=tmp_path / "run")
    model = load(tmp_path / "run", state="last").model
    fresh = model.config.build()  # type: ignore[union-attr, operator]
    fresh.initialise(config.seed)
    old = fresh.state_dict()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, old[n])}
    still = {n for n in old if n.startswith(("embed.", "layers.0."))}
    assert still
    assert moved == {n for n in old if n not in still}


def test_a_run_refuses_parts_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="blocks 7 of a model with"):
        run(tiny(tmp_path, frozen=("7",)), out=tmp_path / "run")
