"""The presets of dynamic routing (21) and of a sweep over sparsity (39) on a user's own text."""

from __future__ import annotations

from pathlib import Path

import pytest

from moestro.models.twin import dense_twin
from moestro.tasks import Text
from moestro.train.held_out import held_out
from moestro.train.load import load
from moestro.train.presets import preset
from moestro.train.run import run
from moestro.train.sweep import evaluate_over
from train.train_cases import text


@pytest.mark.parametrize("name", ["dynamic-routing", "optimal-sparsity"])
def test_the_preset_trains_on_a_text(tmp_path: Path, name: str) -> None:
    given = preset(name)
    whole, twin = given.model, dense_twin(given.model, given.seq_len)  # of two experts' FLOPs, not of sixteen's
    assert twin.flops_per_token(128) == pytest.approx(whole.flops_per_token(128), rel=0.01)
    assert twin.num_params() < whole.num_params() / 2
    config = given.replace(
        model=given.model.replace(num_layers=1),
        data=Text(path=str(text(tmp_path)), cache=str(tmp_path / "cache")),
        twin=False,
        report=False,
        tensorboard=False,
        steps=2,
        batch_size=2,
        seq_len=16,
        eval_windows=4,
    )
    assert run(config, out=tmp_path / "run").complete
    if name == "dynamic-routing":  # p may be moved afterwards: compute follows
        loaded = load(tmp_path / "run")
        found = evaluate_over(
            loaded.model,
            config.objective.build(),
            held_out(loaded),
            loaded.config,
            [0.2, 0.4, 0.8],
            "top_p",
        )
        experts = [sum(sum(layer["load"]) for layer in one.layers.values()) / one.tokens for one in found.values()]
        assert 1 <= experts[0] < experts[1] < experts[2] <= 16
