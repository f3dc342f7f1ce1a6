"""Steps of routing methods: what is compared costs the same; figures are computed right. No test looks at a clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moestro.bench.goals import GOALS, METHOD, PLAIN, ROUTING, judged
from moestro.bench.picture import panels
from moestro.bench.routing import TOLERANCE, measure, methods, plain
from moestro.bench.tables import regime_tables
from moestro.cli.app import run as command
from moestro.core.errors import UserError
from moestro.models.config import Decoder
from moestro.routers.config import Raw, Renormalised, Router, TopK
from moestro.tasks import Text
from moestro.train.config import TrainRun
from moestro.train.presets import preset


def tiny(folder: Path, **changes: Any) -> TrainRun:
    (folder / "text.txt").write_text("the cat sat on the mat; the dog sat on the log. " * 100)
    data = Text(path=str(folder / "text.txt"), cache=str(folder / "cache"))
    return preset("tiny").replace(data=data, batch_size=2, seq_len=16, device="cpu", **changes)


@pytest.mark.parametrize("name", ROUTING)
def test_the_plain_layer_costs_what_the_method_costs(name: str) -> None:
    shape = preset("stdlib").model.replace(allow_noncausal=True)
    assert isinstance(shape, Decoder)
    method = methods()[name]
    ours = shape.replace(moe=method.layer)
    other = plain(ours, method, 128)
    assert abs(other.flops_per_token(128) / ours.flops_per_token(128) - 1) <= TOLERANCE
    layer = other.moe
    assert layer is not None
    assert isinstance(layer.router, Router)
    assert layer.router.select == TopK(k=method.k)
    assert isinstance(layer.router.weigh, Raw if method.k == 1 else Renormalised)
    assert layer.num_experts == method.layer.num_experts


def test_record_of_a_race(tmp_path: Path) -> None:
    chosen = (ROUTING[2], ROUTING[4], *ROUTING[6:])
    record = measure(tiny(tmp_path), rounds=1, steps=1, only=chosen)
    assert json.loads(json.dumps(record)) == record
    assert list(record["regimes"]) == list(chosen) == record["methods"]
    assert [g["regime"] for g in record["goals"]] == list(chosen)
    for name, regime in record["regimes"].items():
        method, other = regime["rows"][METHOD], regime["rows"][PLAIN]
        assert len(method["seconds"]) == len(other["seconds"]) == 1
        k = methods()[name].k
        assert other["experts_per_token"] == k
        if "top-p" not in name and "schedule" not in name:
            assert method["experts_per_token"] == k
        assert method["flops_per_token"] == pytest.approx(
            other["flops_per_token"], rel=0.6 if "top-p" in name else 0.05
        )
    assert 8 < record["regimes"][ROUTING[-1]]["rows"][METHOD]["experts_per_token"] < 16
    (table,) = regime_tables(record)
    assert [row[0] for row in table.rows] == list(chosen)
    assert len(panels(record)) == len(chosen)


def test_a_pass_of_two_counts_half_and_goals_are_judged_by_the_median() -> None:
    goals = [goal for goal in GOALS if goal.benchmark == "routing"]
    assert [goal.regime for goal in goals] == list(ROUTING)
    assert {goal.at_most for goal in goals} == {1.3}
    assert methods()["02 two passes, per pass"].passes == 2
    times = {ROUTING[0]: {METHOD: [1.2, 1.4, 2.6], PLAIN: [1.0, 1.0, 2.0]}}
    (found,) = judged("routing", times)
    assert found["measured"] == pytest.approx(1.3)
    assert found["holds"]


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no method '02'.*02 random experts, by batch"):
        measure(tiny(tmp_path), only=("02",))
    with pytest.raises(UserError, match="at least one round"):
        measure(tiny(tmp_path), rounds=0)
    with pytest.raises(UserError, match="needs a decoder with routed layers"):
        measure(preset("stdlib-dense"))


def test_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny(tmp_path).to_dict()))
    args = ["bench", "train", "routing", str(tmp_path / "config.json"), "--rounds", "1", "--steps", "1"]
    assert command([*args, "--only", ROUTING[0], "--json", "--out", str(tmp_path / "out")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "out" / "record.json").read_text())
    assert (tmp_path / "out" / "picture.svg").is_file()
    assert command(["bench", "train", "routing", "--help"]) == 0
    assert "top-p" in capsys.readouterr().out
