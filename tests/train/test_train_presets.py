"""Presets: they build, say what they are, travel as JSON, and load no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moestro.core.errors import UserError
from moestro.models.twin import dense_twin
from moestro.train.config import TrainRun
from moestro.train.layout import is_run
from moestro.train.presets import DEFAULT, PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_is_and_travels_as_json(name):
    config = preset(name)
    assert (PRESETS[name].__doc__ or "").strip()
    assert TrainRun.from_dict(config.to_dict()) == config
    assert config.borders()[-1] == config.steps
    assert config.model.num_params() > 0


def test_the_default_is_there_and_its_dense_form_is_its_twin():
    sparse, dense = preset(DEFAULT), preset(f"{DEFAULT}-dense")
    assert dense_twin(sparse.model, sparse.seq_len) == dense.model
    with pytest.raises(UserError, match="did you mean 'stdlib'"):
        preset("stdlb")


def test_configs_and_presets_load_no_torch():
    code = "import sys, moestro.train.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"steps": 0}, "steps"), ({"seq_len": 999}, "context"), ({"micro_batch": -1}, "micro_batch")],
)
def test_impossible_settings_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        preset("tiny").replace(**changes)


def test_borders_are_where_evaluations_are():
    config = preset("tiny")
    assert config.replace(steps=25, eval_every=10).borders() == [10, 20, 25]
    assert config.replace(steps=100, eval_every=0).borders() == list(range(10, 101, 10))
    assert config.replace(steps=2, eval_every=0).borders() == [1, 2]
    assert config.replace(steps=1, eval_every=0).borders() == [1]


def test_a_folder_with_somebody_elses_config_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "a web project"}')
    assert not is_run(tmp_path)
