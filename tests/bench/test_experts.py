"""Experts classes of transformers: everybody solves the same problem before anybody is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moestro.bench import experts as module
from moestro.bench.experts import CLASSES, measure
from moestro.cli.app import run
from moestro.core.errors import UserError


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURN", 0.0)


TINY: dict[str, Any] = dict(shape=(16, 8, 4, 2), tokens=(1, 8), rounds=1)


def test_all_classes_and_implementations() -> None:
    record = measure(**TINY, everybody=True)
    assert len(record["regimes"]) == len(CLASSES) * 4
    for name, regime in record["regimes"].items():
        assert regime["ours"] == "moestro"
        assert len(regime["rows"]) == 4
        for who, row in regime["rows"].items():
            assert len(row["seconds"]) == 1, (name, who, row)
            assert ("gate_up_proj" in row["errors"] or "up_proj" in row["errors"]) == ("backward" in name)


def test_a_wrong_one_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import moe

    monkeypatch.setitem(moe.ExpertsInterface._global_mapping, "grouped_mm", lambda self, x, i, w: x)
    record = measure(**TINY, classes=("Mixtral",), only="forward, Mixtral, T 8")
    rows = next(iter(record["regimes"].values()))["rows"]
    assert "its y is" in rows["transformers grouped_mm"]["refused"]
    assert "seconds" not in rows["transformers grouped_mm"]
    assert rows["moestro"]["seconds"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "record.json"
    sizes = ["--shape", "16", "8", "4", "2", "--tokens", "4", "--rounds", "1", "--classes", "Mixtral"]
    assert run(["bench", "experts", *sizes, "--out", str(out), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["regimes"].keys() == json.loads(out.read_text(encoding="utf-8"))["regimes"].keys()
    assert "forward + backward, Mixtral" in said.err


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="did you mean 'Mixtral'"):
        measure(classes=("Mixtrl",))
    with pytest.raises(UserError, match="no regime"):
        measure(only="nothing")
    with pytest.raises(UserError, match="one round"):
        measure(rounds=0)
