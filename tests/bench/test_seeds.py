"""The verdict over seeds: by hand on made differences, and on tiny runs."""

from __future__ import annotations

import json

import pytest

from moestro.bench.seeds import measure, paired, verdict
from moestro.core.errors import UserError
from moestro.train.presets import preset


def test_interval_by_hand():
    found = paired([-0.1, -0.2, -0.3])
    assert found["mean"] == pytest.approx(-0.2)
    assert found["standard_deviation"] == pytest.approx(0.1)
    assert found["high"] == pytest.approx(-0.2 + 4.303 * 0.1 / 3**0.5)
    with pytest.raises(UserError, match="2 to 31 seeds"):
        paired([0.1])


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        ([-0.08, -0.1, -0.09, -0.12, 0.01], "holds"),
        ([-0.08, -0.1, -0.09, 0.02, 0.01], "within noise"),
        ([-0.02, -0.021, -0.019, -0.02, -0.02], "within noise"),
        ([0.05, 0.06, 0.05, 0.07, 0.05], "fails"),
        ([-0.9, -0.01, -0.02, -0.01, -0.01], "within noise"),
    ],
)
def test_verdict(differences, says):
    assert verdict(differences) == says


def test_a_record_goes_on_where_it_stopped_and_refuses_other_settings(tmp_path, monkeypatch):
    config = preset("tiny").replace(steps=2, eval_every=1, eval_windows=4)
    out = tmp_path / "record.json"
    said: list[str] = []
    measure(config, [0], out, said.append)
    record = measure(config, [0, 1], out, said.append)
    assert "recorded already" in said[1]
    assert record["summary"]["seeds"] == 2
    saved = json.loads(out.read_text())
    table = saved["seeds"]["1"]["table"]
    assert saved["seeds"]["1"]["difference"] == table["sparse"]["bits_per_byte"] - table["dense"]["bits_per_byte"]
    with pytest.raises(UserError, match="other settings"):
        measure(config.replace(steps=3), [0], out, said.append)
