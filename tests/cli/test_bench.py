"""Measuring: what is compared is the same step, and figures are computed right. No test looks at a clock."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from moestro.bench import peers
from moestro.bench.timing import interleave, ratio, spread
from moestro.bench.train import AGREEMENT, PEERS, _refuse_wasteful, agreement, measure
from moestro.cli.bench import KINDS
from moestro.moe.layer import MoELayer
from moestro.routers.config import Capacity, Router
from moestro.tasks.config import Text
from moestro.train.config import TrainRun
from moestro.train.presets import preset

from .conftest import Trained, command


@pytest.fixture
def tiny(trained: Trained) -> TrainRun:
    data = Text(path=str(trained.text), cache=str(trained.text.parent / "cache"))
    return preset("tiny").replace(data=data, device="cpu")


def test_every_round_runs_everyone_once_in_another_order() -> None:
    seen: list[str] = []
    now = [0.0]

    def take(name: str, seconds: float):
        def call() -> None:
            seen.append(name)
            now[0] += seconds

        return call

    turns = {name: take(name, i + 1.0) for i, name in enumerate("abcd")}
    found = interleave(turns, rounds=9, warmup=1, clock=lambda: now[0])
    rounds = ["".join(seen[i : i + 4]) for i in range(0, 40, 4)]
    assert all(sorted(r) == list("abcd") for r in rounds)
    assert len(set(rounds)) > 5
    followers = {(a, b) for r in rounds for a, b in itertools.pairwise(r)}
    assert len(followers) == 12  # everyone has come after everyone else
    assert found == {name: [i + 1.0] * 9 for i, name in enumerate("abcd")}
    assert ratio(found, "a", "b").median == 2.0  # a is twice as fast


def test_spread() -> None:
    s = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (s.least, s.low, s.median, s.high, s.most) == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert spread([2.0]).low == 2.0
    # rounds are compared with each other: one slow minute of the machine does not move the ratio
    assert ratio({"a": [1.0, 10.0], "b": [2.0, 20.0]}, "a", "b").least == 2.0


def test_record_of_a_race(tiny: TrainRun) -> None:
    against = ("transformers model", "grouped_mm", "eager")
    record = measure(tiny, rounds=1, steps=1, against=against, name="tiny")
    assert json.loads(json.dumps(record)) == record
    assert list(record["rows"]) == ["sparse", "dense twin", *against]
    for name in against:
        assert record["rows"][name]["worst"] <= AGREEMENT
    for name, row in record["rows"].items():
        if name == "transformers model":
            assert row["step_seconds"] > 0
            assert "experts_seconds" not in row
            continue
        parts = row["experts_seconds"] + row["attention_seconds"] + row["rest_seconds"]
        assert parts == pytest.approx(row["step_seconds"])
        assert row["experts_seconds"] > 0
    assert set(record["ratios"]) == {
        "dense twin",
        "transformers model",
        "grouped_mm",
    }  # eager is shown, never compared with
    assert list(record["regimes"]) == ["tiny, step", "tiny, experts", "tiny, attention"]
    experts = record["regimes"]["tiny, experts"]["rows"]
    assert experts["sparse"]["seconds"] == [pytest.approx(record["rows"]["sparse"]["experts_seconds"], rel=1e-5)]
    assert record["goals"] == []  # none speaks of this preset
    assert record["machine"]["versions"]["torch"] == torch.__version__
    assert record["peak_memory"]["process"] > 1 << 20


def test_another_result_is_no_peer() -> None:
    ours = {"layers.0.ffn.experts.gate_up": torch.ones(4), "nats": torch.tensor(1.0)}
    theirs = {"layers.0.ffn.experts.gate_up_proj": torch.ones(4), "nats": torch.tensor(1.0)}
    assert agreement(ours, theirs)["agrees"]
    theirs["layers.0.ffn.experts.gate_up_proj"][2] += 1e-3
    found = agreement(ours, theirs)
    assert not found["agrees"]
    assert found["where"] == "layers.0.ffn.experts.gate_up"
    theirs["layers.0.ffn.experts.gate_up_proj"][2] = float("nan")
    assert not agreement(ours, theirs)["agrees"]
    assert not agreement(ours, {"nats": torch.tensor(1.0)})["agrees"]


def test_wasteful_peers_are_left_out() -> None:
    large = preset("bench").model
    for implementation, why in (("batched_mm", "384 GiB"), ("eager", "24 GiB")):
        with pytest.raises(peers.Absent, match=why):
            _refuse_wasteful(large, 4096, implementation)
    _refuse_wasteful(large, 4096, "grouped_mm")
    for implementation in ("batched_mm", "eager"):
        _refuse_wasteful(preset("stdlib").model, 2048, implementation)


def test_a_peer_that_cannot_do_it_says_so(tiny: TrainRun, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tiny.model.moe
    assert layer is not None
    limited = tiny.model.replace(moe=layer.replace(router=Router(limit=Capacity(factor=1.0))))
    record = measure(tiny.replace(model=limited), rounds=1, steps=1, against=("grouped_mm",))
    assert "absent" in record["rows"]["grouped_mm"]
    assert "grouped_mm" not in record["ratios"]

    def missing(like: MoELayer, implementation: str) -> nn.Module:
        raise peers.Absent("transformers is not installed")

    monkeypatch.setattr(peers, "_experts", missing)
    record = measure(tiny, rounds=1, steps=1, against=("grouped_mm",))
    assert record["rows"]["grouped_mm"] == {"absent": "transformers is not installed"}
    for regime in record["regimes"].values():
        assert regime["rows"]["grouped_mm"] == {"absent": "transformers is not installed"}


def test_verb(trained: Trained, tiny: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moestro.bench.train as module

    made = measure(tiny, rounds=1, steps=1, against=("grouped_mm",))
    asked: dict[str, object] = {}

    def measured(run: TrainRun, rounds: int, steps: int, say: object, against: object, name: str) -> object:
        asked.update(run=run, rounds=rounds, steps=steps, against=against)
        made["rows"] |= {"eager": {"absent": "not here"}, "batched_mm": {"agrees": False, "where": "x", "worst": 1.0}}
        return made

    monkeypatch.setattr(module, "measure", measured)
    out = tmp_path / "a" / "b"
    status, printed, err = command(
        *("bench", "train", str(trained.folder), "--rounds", "2", "--seed", "5", "--json", "--out", str(out))
    )
    assert status == 0, err
    assert json.loads(printed) == json.loads((out / "record.json").read_text()) == made
    assert (out / "picture.svg").read_text().startswith("<?xml")
    assert isinstance(asked["run"], TrainRun)
    assert (asked["run"].seed, asked["rounds"], asked["steps"]) == (5, 2, None)
    assert asked["against"] == tuple(PEERS)
    for part in ("sparse", "dense twin", "not timed, not here", "gradients differ", "peak memory", "times as fast as"):
        assert part in err


@pytest.mark.parametrize(
    "line", [("bench",), ("bench", "--help"), *(("bench", kind, "--help") for kind in KINDS)], ids=" ".join
)
def test_help(line: tuple[str, ...]) -> None:
    status, out, _ = command(*line)
    assert status == 0
    assert "usage: moestro bench" in out


def test_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moestro.bench import layer

    monkeypatch.setattr(layer, "TURN", 0.0)
    line = ("bench", "layer", "--shape", "16", "8", "4", "2", "--tokens", "8", "--rounds", "2", "--threads", "1")
    status, printed, err = command(*line, "--out", str(tmp_path / "made"), "--json")
    assert status == 0, err
    record = json.loads(printed)
    assert record == json.loads((tmp_path / "made" / "record.json").read_text())
    assert (tmp_path / "made" / "picture.png").read_bytes()[:4] == b"\x89PNG"
    for part in ("forward, D 16 F 8 E 4 K 2, balanced", "dense, width K*F", "loop, unbind", "load average"):
        assert part in err
    status, _, err = command(*line, "--only", "nowhere")
    assert status == 2
    assert "no regime has 'nowhere'" in err


def test_decode(tmp_path: Path) -> None:
    line = ("bench", "decode", "--shape", "16", "8", "4", "2", "--layers", "2", "--tokens", "3", "--passes", "1")
    status, printed, err = command(*line, "--threads", "1", "--model-rounds", "1", "--new-tokens", "4", "--json")
    assert status == 0, err
    record = json.loads(printed)
    assert list(record["regimes"]) == [f"{kind}, 2 layers, D 16 F 8 E 4 K 2" for kind in ("cold decode", "whole model")]
    for part in ("read once, fp32", "ms per layer", "tokens/s", "4 of 4"):
        assert part in err


def test_unknown_measurement() -> None:
    status, _, err = command("bench", "trian")
    assert status == 2
    assert "did you mean 'train'" in err
    assert list(KINDS) == ["layer", "experts", "decode", "train", "widths", "seeds"]


def test_seeds(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    line = ("bench", "seeds", str(trained.folder), "--out", str(out), "--set", "steps=2", "--seeds", "1", "2", "--json")
    status, printed, err = command(*line)
    assert status == 0, err
    record = json.loads(printed)
    assert record == json.loads(out.read_text())
    assert list(record["seeds"]) == ["1", "2"]
    assert "sparse minus dense at equal steps" in err
    assert "seed 2: recorded already" in command(*line)[2]


def test_widths_say_how_many_times_as_long(monkeypatch, tmp_path) -> None:
    from moestro.bench import widths

    monkeypatch.setattr(widths, "SHAPES", ((8, 4, 8, 16),))
    out = tmp_path / "widths.json"
    status, shown, err = command("bench", "widths", "--rounds", "2", "--out", str(out), "--json")
    assert status == 0, err
    (shape,) = json.loads(shown)["shapes"]
    assert shape["times"]["least"] <= shape["times"]["median"] <= shape["times"]["most"]
    assert json.loads(out.read_text()) == json.loads(shown)
    assert "times as long" in err
