"""Goals, tables and pictures say what the raw times say."""

from __future__ import annotations

from typing import Any

import pytest

from moestro.bench import machine
from moestro.bench.goals import GOALS, Goal, judged
from moestro.bench.layer import cases
from moestro.bench.picture import draw, panels
from moestro.bench.record import summed
from moestro.bench.tables import goals_table, markdown, regime_tables, three
from moestro.bench.timing import interleave, ratio

REGIME = "forward, T 64 D 512 F 256 E 32 K 4"


def regime(**seconds: list[float]) -> dict[str, Any]:
    sizes = {"tokens": 64, "dim": 512, "width": 256, "experts": 32, "top_k": 4}
    rows: dict[str, Any] = {
        name: {"seconds": s, "errors": {"y": 1e-7}, "peak_bytes": 2**20} for name, s in seconds.items()
    }
    made = {"kind": "forward", "routing": "balanced", "ours": "moestro", **sizes, "rows": rows}
    return made | summed(made)


def test_goals_by_hand() -> None:
    seconds = {
        f"{REGIME}, balanced": {"moestro": [1.0, 2.0, 1.0], "transformers grouped_mm": [3.0, 6.0, 2.0], "absent": []},
        f"{REGIME}0, balanced": {"moestro": [1.0], "transformers grouped_mm": [1.0]},
        "somewhere else": {"moestro": [1.0]},
    }
    fast = Goal("layer", REGIME, "moestro", "transformers grouped_mm", at_least=2.5)
    (found,) = judged("layer", seconds, [fast])
    assert (found["measured"], found["fastest"], found["holds"]) == (3.0, 2.0, True)
    (found,) = judged("layer", seconds, [Goal("layer", REGIME, "moestro", "transformers grouped_mm", at_least=3.1)])
    assert not found["holds"]
    (found,) = judged("layer", seconds, [Goal("layer", REGIME, "moestro", "transformers grouped_mm", at_most=0.3)])
    assert found["measured"] == pytest.approx(1 / 3)
    assert not found["holds"]
    (found,) = judged("layer", seconds, [Goal("layer", REGIME, "moestro", "absent", at_most=1.0)])
    assert (found["measured"], found["holds"], found["why"]) == (None, None, "absent was not timed")
    assert judged("layer", seconds, [Goal("layer", REGIME, "moestro", "not asked for", at_most=1.0)]) == []
    assert judged("decode", seconds, [fast]) == []


def test_every_layer_goal_speaks_of_a_regime_that_is_measured() -> None:
    import torch

    measured = {name for case in cases() for name in case.regimes(torch.float32)}
    for goal in GOALS:
        assert (goal.at_least is None) != (goal.at_most is None)
        if goal.benchmark == "layer" and "float16" not in goal.regime:
            assert any(name.startswith(goal.regime + ", ") for name in measured), goal


def test_tables() -> None:
    made = regime(moestro=[0.001, 0.002], other=[0.004, 0.006])
    made["rows"]["gone"] = {"absent": "not installed"}
    made["rows"]["slow"] = {"refused": "its output is wrong", "compile_seconds": 7.2}
    record = {"regimes": {f"{REGIME}, balanced": made}, "goals": []}
    (table,) = regime_tables(record)
    assert table.title == "forward, D 512 F 256 E 32 K 4, balanced"
    assert table.columns == ("", "T 64, ms", "relative error", "peak memory")
    assert table.rows[0] == ("moestro", "1.5 (1.25 to 1.75)", "1e-07", "1 MiB")
    assert table.rows[2] == ("gone", "-", "-", "-")
    assert table.notes == (
        "gone: not timed, not installed",
        "slow: not timed, its output is wrong",
        "slow: compilation took 7 s, not counted",
    )
    assert regime_tables(record, routings=("zipf",)) == []
    text = markdown(table)
    assert "| moestro | 1.5 (1.25 to 1.75) | 1e-07 | 1 MiB |" in text
    assert text.count("\n- ") == 3
    assert made["ratios"]["other"]["median"] == 3.5
    goals = judged("layer", {f"{REGIME}, balanced": {"moestro": [1.0], "transformers grouped_mm": [3.0]}})
    (row,) = goals_table([{"goals": goals}]).rows
    assert row[3:] == ("at least 2.5", "3.00 (3.00 to 3.00)", "3.00", "holds")


def test_three_digits() -> None:
    assert [three(v) for v in (0.01234, 1.234, 12.34, 123.4, 1234.5)] == ["0.0123", "1.23", "12.3", "123", "1234"]


def test_picture(tmp_path: Any) -> None:
    made = regime(moestro=[0.001, 0.002], other=[0.04, 0.06])
    record = {
        "what": "time of a layer & more",
        "machine": {"processor": "a processor", "threads": 2, "instruction_set": "AVX2"},
        "regimes": {REGIME: made, "router, T 1": made | {"kind": "router"}},
    }
    (panel,) = panels(record)
    assert [bar.name for bar in panel.bars] == ["moestro", "other"]
    many = {f"{routing} {i}": made | {"routing": routing} for i in range(7) for routing in ("balanced", "zipf")}
    assert [p.title for p in panels(record | {"regimes": many})] == [f"balanced {i}" for i in range(7)]
    assert (panel.bars[0].value, panel.bars[0].kind, panel.bars[1].kind) == (1.5, "ours", "other")
    draw(record, tmp_path / "picture")
    assert REGIME in (tmp_path / "picture.svg").read_text()
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_contenders_that_sit_out() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    found = interleave(calls, 4, most={"b": 2})
    assert (len(found["a"]), len(found["b"]), seen.count("b")) == (4, 2, 3)  # with the warm-up
    assert ratio({"a": [1.0, 2.0, 9.0], "b": [2.0, 4.0]}, "a", "b").median == 2.0


def test_busy_machines_are_named() -> None:
    assert machine.warn_if_busy([1.2, 0.0, 0.0]) is None
    assert machine.warn_if_busy(None) is None
    assert "load average 2.5" in (machine.warn_if_busy([2.5, 0.0, 0.0]) or "")


def test_peak_of_a_call() -> None:
    import torch

    device = torch.device("cpu")
    found = machine.peak_of(lambda: torch.ones(8 << 20), device)
    if found is None:
        pytest.skip("this system does not tell the peak of resident memory")
    assert 30 << 20 < found < 60 << 20
    small = machine.peak_of(lambda: None, device)
    assert small is not None
    assert small < 8 << 20
