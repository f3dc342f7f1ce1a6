"""The table of systems, the effects worked by hand, the rule of the verdict, and what the registry says."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from moestro.core.errors import UserError
from moestro.models.config import Decoder
from moestro.models.twin import dense_twin
from moestro.papers.catalogue import CATALOGUE, entry
from moestro.papers.page import NONE, fill, filled, pictures
from moestro.papers.paper import Agree, Arm, Claim, Computed, Difference, Paper, Ratio, find_part
from moestro.papers.parts import PARTS
from moestro.papers.record import LEAST_SEEDS, MINUTES, MINUTES_PER_SEED, judge
from moestro.papers.registry import STATES, comparison, records, registered, state
from moestro.papers.run import check, equal_updates, reproduce
from moestro.train.presets import PRESETS, preset
from papers.paper_cases import ENTRY, made_up

ROOT = Path(__file__).parents[2]
PAPERS = [made_up(), *filter(None, map(registered, CATALOGUE.values()))]

FIGURES = {"a": {"x": 2.0, "y": 5.0}, "b": {"x": 8.0}}


def test_the_table_of_systems() -> None:
    assert [e.number for e in CATALOGUE.values()] == list(range(1, 53))
    for e in CATALOGUE.values():
        assert e.year == 2000 + int(e.arxiv[:2])  # of the first version
        assert e.title
        assert e.adds
        assert len(e.adds) < 140
        assert "- " not in (e.title + e.adds).replace(" - ", "")
    assert entry("thor") is entry("2") is entry("02") is CATALOGUE["thor"]
    with pytest.raises(UserError, match="no system 'thro' .did you mean 'thor'"):
        entry("thro")


def test_named_parts_exist() -> None:
    for slug, parts in PARTS.items():
        assert registered(CATALOGUE[slug]) is None, f"{slug} has a file: its parts belong there"
        for name in filter(None, parts.values()):
            assert callable(find_part(name)), name
    for name in ("moestro.routers.config:Nothing", "moestro.nowhere:X", ""):
        with pytest.raises(UserError, match="no part"):
            find_part(name)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.entry.slug)
def test_every_comparison_keeps_the_contract(paper: Paper, tmp_path: Path) -> None:
    check(paper, arms := tuple(paper.arms(True)))
    equal_updates(paper, arms, smoke=True)
    assert not paper.preset or paper.preset in PRESETS
    exec(compile(paper.example, paper.entry.slug, "exec"), {})
    record = reproduce(paper, tmp_path, smoke=True, seeds=1)
    assert record["seeds"] == [0]
    assert (tmp_path / "picture.svg").is_file()


def test_committed_records() -> None:
    for found in CATALOGUE.values():
        record = state(found).record
        if record is not None:
            assert faults(record, comparison(found.slug)) == [], found.slug


def faults(record: dict[str, Any], paper: Paper) -> list[str]:
    """What a record may not be when it is committed."""
    minutes, seeds = record["minutes"], len(record["seeds"])
    rules = [claim.describe() for claim in paper.claims]
    wrong = {
        "incomplete": not record["complete"] or seeds < LEAST_SEEDS,
        "too long": minutes["slowest_seed"] > MINUTES_PER_SEED or (minutes["total"] > MINUTES and seeds == LEAST_SEEDS),
        "other rules": record["settings"]["rules"] != rules,
    }
    return [what for what, is_so in wrong.items() if is_so]


def test_faults_of_records_are_found() -> None:
    paper = made_up()
    good: dict[str, Any] = {
        "complete": True,
        "seeds": [0, 1, 2],
        "minutes": {"total": 39.0, "slowest_seed": 10.0},
        "settings": {"rules": [claim.describe() for claim in paper.claims]},
    }
    assert faults(good, paper) == []
    assert faults(good | {"complete": False}, paper) == ["incomplete"]
    assert faults(good | {"seeds": [0, 1]}, paper) == ["incomplete"]
    assert faults(good | {"minutes": {"total": 41.0, "slowest_seed": 10.0}}, paper) == ["too long"]
    assert faults(good | {"minutes": {"total": 41.0, "slowest_seed": 10.0}, "seeds": [0, 1, 2, 3]}, paper) == []
    assert faults(good | {"minutes": {"total": 30.0, "slowest_seed": 11.0}}, paper) == ["too long"]
    assert faults(good, made_up(updates=11, claims=paper.claims[:1])) == ["other rules"]


@pytest.mark.parametrize(
    ("effect", "value"),
    [
        (Difference(figure="x", of="a", than="b"), 6.0),
        (Difference(figure="x", of="a", than="b", better="higher"), -6.0),
        (Difference(figure="x", of="a", than="b", relative=True), 0.75),
        (Difference(figure="x", of="b", than="a", within=7.0), 1.0),  # 6 worse, 7 allowed
        (Difference(figure="y", of="a", than="b", than_figure="x"), 3.0),
        (Agree(figure="x", of="a", than="b", within=7.0), 1.0),
        (Agree(figure="x", of="a", than="b", within=0.5, relative=True), -0.25),
        (Ratio(figure="x", of="a", than="b", times=3.0), 1.0),  # 8 / 2 - 3
        (Ratio(figure="x", of="a", than="b", better="higher"), -0.75),
        (Computed(text="sum", function=lambda f: f["a"]["x"] + f["b"]["x"]), 10.0),
    ],
)
def test_effects_by_hand(effect, value) -> None:
    assert effect(FIGURES) == pytest.approx(value)
    assert effect.describe()


def test_a_ratio_to_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="division by 0"):
        Ratio(figure="x", of="a", than="b")({"a": {"x": 0.0}, "b": {"x": 1.0}})


@pytest.mark.parametrize(
    ("effects", "threshold", "word"),
    [
        ([0.75, 0.5, 0.25], 0.5, "holds"),  # mean 0.5
        ([0.75, 0.5, 0.25], 0.51, "within noise"),  # the mean does not reach it
        ([0.9, 0.9, -0.01], 0.1, "within noise"),  # one seed is on the other side
        ([0.9, 0.9, 0.0], 0.1, "within noise"),  # and 0 has no sign
        ([-0.3, -0.2, -0.1], 0.2, "fails"),  # mean -0.2, spread 0.1
        ([-0.3, 0.2, -0.1], 0.2, "within noise"),  # mean -0.07, spread 0.25
        ([-0.1, -0.1, -0.1], 0.0, "fails"),  # no spread
        ([0.3, 0.2], 0.2, "undecided"),
    ],
)
def test_the_rule_of_the_verdict(effects, threshold, word) -> None:
    assert judge(effects, threshold) == word


def test_what_a_paper_may_not_be() -> None:
    for changes, says in (
        ({"grid": ()}, "learning rates"),
        ({"grid": (0.1, 0.1)}, "there once"),
        ({"tuning": 0.0}, "tuning"),
        ({"updates": 0}, "at least 1"),
        ({"claims": (Claim(text="", effect=Agree(figure="x", of="a", than="b", within=1), main=False),)}, "main claim"),
    ):
        with pytest.raises(UserError, match=f"made-up.*{says}"):
            made_up(**changes)
    twice = (Arm(name="system", cost=1.0), Arm(name="system", cost=1.0))
    with pytest.raises(UserError, match="two arms of one name"):
        check(made_up(), twice)
    with pytest.raises(UserError, match="no arm is called 'system'"):
        check(made_up(), (Arm(name="other", cost=1.0),))
    with pytest.raises(UserError, match="no part 'moestro.routers.config:Gone'"):
        check(made_up(parts={"x": "moestro.routers.config:Gone"}), made_up().arms(False))
    with pytest.raises(UserError, match="give it a model or a cost"):
        Arm(name="empty").flops()


def test_equal_compute_is_counted_from_configs() -> None:
    run = preset("tiny")
    model: Decoder = run.model
    system = Arm(name="system", model=model, seq_len=32, passes=2)
    flops = model.flops_per_token(32, "train")
    assert system.flops() == 2 * flops
    twin = Arm(name="twin", model=dense_twin(model, 32), seq_len=32, passes=2, equal="both")
    single = Arm(name="single", model=model, seq_len=32, equal="flops")
    free = Arm(name="free", cost=1.0)
    found = equal_updates(made_up(), (system, twin, single, free))
    assert found == {"system": 10, "twin": 10, "single": 20, "free": 10}  # one pass instead of two: twice the updates
    odd = Arm(name="odd", model=model, seq_len=32, passes=1, equal="both")
    with pytest.raises(UserError, match=r"arm odd takes -50.0% of the FLOPs"):
        equal_updates(made_up(), (system, odd))


def test_states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nothing = CATALOGUE["engram"]
    assert state(nothing).word == "planned"
    assert state(nothing).parts == {}
    whole = {"choice": "moestro.routers.config:TopK"}
    monkeypatch.setitem(PARTS, "engram", {**whole, "tables": ""})
    assert state(nothing).word == "planned"
    monkeypatch.setitem(PARTS, "engram", whole)
    assert state(nothing).word == "parts"
    assert set(STATES) == {"planned", "parts", "ready", "recorded"}
    with pytest.raises(UserError, match="engram has no comparison yet .parts."):
        comparison("engram")

    monkeypatch.setitem(CATALOGUE, "made-up", ENTRY)
    module = types.ModuleType("moestro.papers.made_up")
    module.PAPER = made_up()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert state(ENTRY, tmp_path).word == "ready"
    file = tmp_path / "made-up" / "record.json"
    file.parent.mkdir()
    file.write_text('{"complete": false, "summary": {"verdict": "undecided"}}')
    assert state(ENTRY, tmp_path).word == "ready"
    file.write_text('{"complete": true, "summary": {"verdict": "fails"}}')
    assert (state(ENTRY, tmp_path).word, state(ENTRY, tmp_path).verdict) == ("recorded", "fails")
    file.write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        state(ENTRY, tmp_path)
    module.PAPER = made_up(entry=nothing)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="must be the Paper of made-up"):
        registered(ENTRY)


def test_records_lie_in_the_checkout() -> None:
    assert records() == ROOT / "results" / "papers"


def test_the_page_is_up_to_date() -> None:
    page = ROOT / "docs" / "papers.md"
    text = page.read_text(encoding="utf-8")
    assert text == filled(page), "run moestro.papers.page.fill on it"
    assert all(f"| `{slug}` |" in text for slug in CATALOGUE)
    for source, target in pictures(page).items():
        assert source.read_bytes() == target.read_bytes()


def test_a_page_without_records(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- papers: records -->\nold\n<!-- end of papers -->\nAfter.\n")
    fill(page, tmp_path)
    text = page.read_text()
    assert NONE in text
    assert "old" not in text
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    page.write_text(text.replace("records", "nothing"))
    with pytest.raises(UserError, match="no part 'nothing'"):
        filled(page, tmp_path)
