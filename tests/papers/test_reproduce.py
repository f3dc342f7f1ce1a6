"""The runner on a system with known differences: equal compute, learning rates, records, resuming, errors, pictures."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.core.errors import UserError
from moestro.papers.paper import Claim, Diverged, Job, Lines, Outcome
from moestro.papers.picture import averaged
from moestro.papers.record import begin, taken
from moestro.papers.run import Watch, reproduce
from moestro.papers.tables import about, tables
from papers.paper_cases import CLAIMS, JITTER, arms, gap, made_up, sample, train


class Seen(Watch):
    """What a bar would show."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.titles: list[str] = []
        self.said: list[str] = []

    def on_start(self, updates: int, done: int) -> None:
        self.total, self.done = updates, done

    def on_run(self, title: str, updates: int) -> None:
        self.titles.append(title)

    def on_update(self, updates: int) -> None:
        self.done += updates

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    sample(folder)
    return folder


def test_a_full_record(data: Path, tmp_path: Path) -> None:
    seen = Seen()
    record = reproduce(made_up(), tmp_path / "out", data=data, watch=seen, command="moestro reproduce made-up")
    assert record == json.loads((tmp_path / "out" / "record.json").read_text())
    assert seen.done == seen.total == 5 * (10 + 10 + 20)  # three learning rates with the first seed, and two more seeds
    assert len(seen.titles) == 3 * 5
    assert (record["schema"], record["slug"], record["seeds"], record["complete"]) == (1, "made-up", [0, 1, 2], True)
    assert record["command"] == "moestro reproduce made-up"
    assert {"moestro", "torch", "python", "threads"} <= record["made_with"].keys()
    settings = record["settings"]["arms"]
    assert {name: arm["updates"] for name, arm in settings.items()} == {"system": 10, "dense": 10, "plain": 20}
    assert {name: arm["flops"] for name, arm in settings.items()} == {"system": 1.0, "dense": 1.005, "plain": 1.0}
    for arm in settings:
        assert {run["lr"] for run in record["runs"][arm].values()} == {0.01}
        assert sum("chosen" in tried for tried in record["tuning"][arm].values()) == 1
    summary = record["summary"]
    assert summary["arms"]["system"]["loss"]["mean"] == pytest.approx(1.0)
    assert summary["arms"]["system"]["loss"]["spread"] == pytest.approx(0.02)  # of 0, 0.02, -0.02
    better, aside = summary["claims"]
    assert better["values"] == pytest.approx([0.5, 0.5, 0.5])
    assert (better["verdict"], summary["verdict"]) == ("holds", "holds")
    assert aside["values"] == pytest.approx([0.025, (0.1 + 9 * 0.02) / 4, (0.1 - 9 * 0.02) / 4])  # by hand, from JITTER
    assert aside["verdict"] == "within noise"
    assert [p["ours"] for p in summary["published"]] == [pytest.approx(0.5), None]
    assert summary["counted"] == [{"what": "parameters", "ours": 1234567, "published": 1.2e6, "unit": ""}]
    assert (tmp_path / "out" / "picture.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "out" / "picture.png").is_file()
    assert not (tmp_path / "out" / "work").exists()
    assert (tmp_path / "out" / "record.json").stat().st_size < 20_000


def test_the_record_in_words(data: Path, tmp_path: Path) -> None:
    record = reproduce(made_up(), tmp_path / "out", data=data)
    assert about(record).startswith(record["when"])
    found = tables(record)
    assert [t.title for t in found] == [
        "Arms",
        "Claims",
        "The paper's figures beside ours",
        "Counted, not trained",
    ]
    rows = {row[0]: row for row in found[0].rows}
    assert rows["system *"][1:] == ("all of it", "10", "1.00", "0.01", "1 ± 0.02", "0.75 ± 0.005")
    assert found[1].rows[0][-1] == "holds"
    assert found[2].rows == (
        ("loss below dense", "0.3 nats", "0.5 nats", ""),
        ("BLEU", "+2", "–", "too large"),
    )
    assert found[3].rows == (("parameters", "1,200,000", "1,234,567"),)
    assert all(len(row) == len(t.columns) for t in found for row in t.rows)


@pytest.mark.parametrize("tuning", [1.0, 0.5])
@pytest.mark.parametrize("stop_at", [0, 2, 9, 14])
def test_a_stopped_comparison_goes_on(data: Path, tmp_path: Path, stop_at: int, tuning: float) -> None:
    """Stopped before any of its runs, it ends with the same record, and makes no run twice."""
    paper = made_up(tuning=tuning)
    whole = reproduce(paper, tmp_path / "whole", data=data)
    left, made = stop_at, []

    def stopping(job: Job) -> Outcome:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        made.append((job.arm.name, job.seed, job.lr, job.updates))
        return train(job)

    with pytest.raises(KeyboardInterrupt):
        reproduce(made_up(tuning=tuning, train=stopping), tmp_path / "out", data=data)
    left, seen = -1, Seen()
    record = reproduce(made_up(tuning=tuning, train=stopping), tmp_path / "out", data=data, watch=seen)
    assert seen.done == seen.total == sum(run[-1] for run in made)
    assert len(set(made)) == len(made) == (3 * 5 if tuning == 1 else 3 * 6)
    assert _figures(record) == _figures(whole)


def _figures(record: dict[str, Any]) -> Any:
    """A record without times, and without the order in which arms were written."""
    cut = {k: v for k, v in record.items() if k not in ("when", "minutes")}
    return json.loads(json.dumps(cut, sort_keys=True), object_hook=lambda d: {k: d[k] for k in d if k != "minutes"})


def test_more_seeds_later(data: Path, tmp_path: Path) -> None:
    first = reproduce(made_up(), tmp_path / "out", data=data, seeds=1)
    assert (first["complete"], first["summary"]["verdict"], first["seeds"]) == (False, "undecided", [0])
    seen = Seen()
    record = reproduce(made_up(), tmp_path / "out", data=data, seeds=4, watch=seen)
    assert (record["complete"], record["summary"]["verdict"], record["seeds"]) == (True, "holds", [0, 1, 2, 3])
    assert len(seen.titles) == 3 * 3
    again = reproduce(made_up(), tmp_path / "out", data=data, seeds=3, watch=(seen := Seen()))
    assert again["seeds"] == [0, 1, 2, 3]  # what is recorded is never left out
    assert seen.titles == []
    assert seen.done == seen.total


def test_learning_rates_are_chosen_by_validation_alone(data: Path, tmp_path: Path) -> None:
    """The system's validation figure is best at 0.001, its test figure at 0.01; nothing finite comes of 0.1."""

    def other(job: Job) -> Outcome:
        if job.lr == 0.1:
            raise Diverged("the loss is not finite")
        validation = {0.001: 1.0, 0.01: 2.0}[job.lr]
        return Outcome(validation=validation, test={"loss": 5.0 if job.lr == 0.001 else 4.0})

    seen = Seen()
    paper = made_up(train=other, claims=CLAIMS[:1])
    record = reproduce(paper, tmp_path / "out", data=data, watch=seen)
    assert all(run["lr"] == 0.001 for runs in record["runs"].values() for run in runs.values())
    assert record["summary"]["arms"]["system"]["loss"]["mean"] == 5.0
    assert record["tuning"]["system"]["0.1"]["validation"] is None
    assert "test" not in str(record["tuning"])  # test figures of what was not chosen are not even kept
    assert any("edge of the grid" in line for line in seen.said)
    paper = made_up(train=lambda job: Outcome(validation=math.inf, test={}))
    with pytest.raises(UserError, match="arm system: no learning rate of 0.001, 0.01, 0.1 gave a finite"):
        reproduce(paper, tmp_path / "nothing", data=data)


def test_smoke_needs_no_data(tmp_path: Path) -> None:
    seen = Seen()
    record = reproduce(made_up(), tmp_path / "out", data=Path("/nowhere"), smoke=True, seeds=3, watch=seen)
    assert record["smoke"]
    assert not record["complete"]
    assert record["summary"]["verdict"] == "undecided"
    assert record["settings"]["grid"] == [0.001]
    assert seen.total == 3 * (2 + 2 + 4)
    with pytest.raises(UserError, match="a record of other settings .smoke, grid, arms"):
        reproduce(made_up(), tmp_path / "out", data=Path("/nowhere"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"updates": 11}, "other settings .arms"),
        ({"revision": 2}, "other settings .revision"),
        ({"claims": (Claim(text="x", effect=gap(1.0)),)}, "other settings .rules"),
        ({"grid": (0.01, 0.1)}, "other settings .grid"),
        ({"arms": lambda smoke: arms(smoke)[:2], "claims": CLAIMS[:1]}, "other settings .arms"),
    ],
)
def test_a_record_of_other_settings_is_refused(data: Path, tmp_path: Path, changes: Any, says: str) -> None:
    reproduce(made_up(), tmp_path / "out", data=data, seeds=1)
    before = (tmp_path / "out" / "record.json").read_bytes()
    with pytest.raises(UserError, match=says):
        reproduce(made_up(**changes), tmp_path / "out", data=data)
    assert (tmp_path / "out" / "record.json").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "holds no JSON"),
        ("[]", "no record of made-up"),
        ('{"schema": 1, "slug": "thor"}', "no record of made-up"),
        ('{"schema": 9, "slug": "made-up"}', "schema 9, not 1"),
    ],
)
def test_a_damaged_record_is_an_error(data: Path, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match=says):
        reproduce(made_up(), tmp_path, data=data)


def diverging(job: Job) -> Outcome:
    raise Diverged("too fast")


def figures(**test: float) -> Callable[[Job], Outcome]:
    return lambda job: Outcome(validation=1.0, test=test)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": figures(loss=math.nan)}, "made-up: arm system, seed 0, .*: loss is not finite"),
        ({"train": diverging, "grid": (0.01,)}, "made-up: too fast"),
        ({"train": figures(perplexity=1.0)}, "figure 'perplexity' is not described"),
        ({"train": figures(accuracy=1.0)}, "a claim needs a figure or an arm that is not there: 'loss'"),
    ],
)
def test_errors(data: Path, tmp_path: Path, changes: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        reproduce(made_up(**changes), tmp_path / "out", data=data)


def test_missing_data_and_seeds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="made-up.json: missing; it comes from nowhere"):
        reproduce(made_up(), tmp_path / "out", data=tmp_path)
    with pytest.raises(UserError, match="--seeds must be at least 1"):
        reproduce(made_up(), tmp_path / "out", seeds=0)


def test_what_arms_share_is_prepared_once_per_seed(data: Path, tmp_path: Path) -> None:
    prepared: list[int] = []

    def prepare(job: Job) -> None:
        prepared.append(job.seed)
        assert job.arm.name == "system"
        (job.shared / "base").write_text(str(job.seed))

    def reading(job: Job) -> Outcome:
        assert (job.shared / "base").read_text() == str(job.seed)
        if job.seed == 1 and not (tmp_path / "go").exists():
            raise KeyboardInterrupt
        return train(job)

    paper = made_up(prepare=prepare, train=reading)
    with pytest.raises(KeyboardInterrupt):
        reproduce(paper, tmp_path / "out", data=data)
    (tmp_path / "go").touch()
    record = reproduce(paper, tmp_path / "out", data=data)
    assert prepared == [0, 1, 2]
    assert set(record["prepared"]) == {"0", "1", "2"}
    shutil.rmtree(tmp_path / "out" / "work", ignore_errors=True)
    reproduce(paper, tmp_path / "out", data=data, seeds=4)
    assert prepared == [0, 1, 2, 3]


def test_generators_are_seeded_and_given_back(data: Path, tmp_path: Path) -> None:
    def drawing(job: Job) -> Outcome:
        return Outcome(validation=1.0, test={"loss": torch.rand(()).item(), "accuracy": 0.0})

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    record = reproduce(made_up(train=drawing), tmp_path / "out", data=data)
    assert torch.equal(torch.rand(3), expected)
    losses = [run["test"]["loss"] for run in record["runs"]["system"].values()]
    assert losses == [run["test"]["loss"] for run in record["runs"]["dense"].values()]
    assert len(set(losses)) == 3


def test_minutes_are_counted_once() -> None:
    run = {"minutes": 4.0}
    record = {
        "prepared": {"0": 1.0, "1": 1.0},
        "runs": {"a": {"0": run, "1": run}, "b": {"0": run}},
        "tuning": {"a": {"0.1": {"minutes": 4.0, "kept": True}, "0.2": {"minutes": 3.0}}},
    }
    assert taken(record) == {"total": 17.0, "slowest_seed": 9.0, "tuning": 3.0, "within_budget": True}
    record["prepared"]["0"] = 2.5
    assert not taken(record)["within_budget"]


def test_an_arm_may_train_in_its_own_way(data: Path, tmp_path: Path) -> None:
    import dataclasses

    def own(job: Job) -> Outcome:
        return Outcome(validation=0.0, test={"loss": 7.0, "accuracy": 0.0})

    def with_own(smoke: bool):
        return tuple(dataclasses.replace(arm, train=own) if arm.name == "dense" else arm for arm in arms(smoke))

    record = reproduce(made_up(arms=with_own), tmp_path / "out", data=data)
    assert record["summary"]["arms"]["dense"]["loss"]["mean"] == 7.0
    assert record["summary"]["arms"]["system"]["loss"]["mean"] == pytest.approx(1.0)


def test_curves_are_averaged_over_seeds(data: Path, tmp_path: Path) -> None:
    picture = Lines(curve="loss", x="updates", y="nats")
    record = reproduce(made_up(picture=picture), tmp_path / "out", data=data)
    found = {curve.name: curve.points for curve in averaged(record, picture)}
    assert found["system"] == [(0.0, 2.0), (10.0, pytest.approx(1.0 + sum(JITTER[:3]) / 3))]
    assert found["plain"][-1][0] == 20.0
    assert (tmp_path / "out" / "picture.svg").is_file()


def test_a_new_record_writes_nothing(tmp_path: Path) -> None:
    paper = made_up()
    updates = {"system": 10, "dense": 10, "plain": 20}
    record = begin(paper, arms(False), updates, smoke=False, command="", file=tmp_path / "record.json")
    assert record["command"] is None
    assert not list(tmp_path.iterdir())
