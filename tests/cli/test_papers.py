"""`moestro papers` and `moestro reproduce`."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from moestro.cli.progress_runs import Bar, watching
from moestro.papers.catalogue import CATALOGUE
from papers.paper_cases import ENTRY, made_up

from .conftest import command


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up system, as if it lay in the package."""
    module = types.ModuleType("moestro.papers.made_up")
    module.PAPER = made_up(preset="tiny")  # type: ignore[attr-defined]
    monkeypatch.setitem(CATALOGUE, "made-up", ENTRY)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_list(tmp_path: Path) -> None:
    status, out, _ = command("papers", "--results", str(tmp_path))
    assert status == 0
    text = " ".join(out.split())
    for e in CATALOGUE.values():
        assert f"{e.number:02d} {e.slug} {e.title.split()[0]}" in text
        assert f"({e.year})" in text
    assert "planned: parts are missing" in text
    status, out, _ = command("papers", "--json")
    rows = json.loads(out)
    assert status == 0
    assert [row["number"] for row in rows] == list(range(1, 53))
    assert rows[0].keys() == {"number", "slug", "title", "year", "arxiv", "adds", "state", "verdict", "parts"}


def test_a_planned_one() -> None:
    status, out, _ = command("papers", "muon-mla-moe")
    assert status == 0
    assert "2025, https://arxiv.org/abs/2509.24406" in out
    assert "from moestro.optim.config import Muon" in out
    assert command("papers", "23")[1] == out
    assert command("papers", "engram")[0] == 0


def test_a_registered_one_and_its_record(known: None, tmp_path: Path) -> None:
    status, out, _ = command("papers", "made-up", "--results", str(tmp_path))
    assert status == 0
    assert "state: ready" in out
    assert "    print(TopK(k=2))" in out
    assert "moestro reproduce made-up" in out
    assert "moestro train tiny" in out
    (tmp_path / "made-up.json").write_text("[0.5]")
    folder = tmp_path / "made-up"
    line = ["reproduce", "made-up", "--out", str(folder), "--data", str(tmp_path)]
    status, out, err = command(*line)
    assert status == 0
    assert "verdict: holds" in out
    assert "200 updates in all" in err
    assert "dense, seed 0, learning rate 0.01" in err
    assert json.loads((folder / "record.json").read_text())["command"] == "moestro " + " ".join(line)
    status, out, err = command(*line, "--json")
    assert status == 0
    assert json.loads(out)["summary"]["verdict"] == "holds"
    assert "200 of them recorded already" in err
    status, out, _ = command("papers", "99", "--results", str(tmp_path))
    assert "state: recorded" in out
    assert "better than dense" in out


def test_smoke(known: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = command("reproduce", "made-up", "--smoke")
    assert status == 0
    assert "verdict: undecided" in out
    assert (tmp_path / "runs" / "reproduce" / "made-up-smoke" / "record.json").is_file()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("papers nothing", "no system 'nothing'"),
        ("reproduce engram", "engram has no comparison yet (planned)"),
        ("reproduce", "missing"),
        ("reproduce made-up --seeds 0", "--seeds must be at least 1"),
        ("reproduce made-up --data /nowhere", "/nowhere/made-up.json: missing; it comes from nowhere"),
    ],
)
def test_errors_are_one_line(
    known: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*line.split())
    assert status == 2
    assert out == ""
    assert f"{says}" in err
    assert err.startswith("moestro: error: ")
    assert err.count("\n") == 1


def test_one_bar_over_all_runs() -> None:
    stream = io.StringIO()
    bar = Bar(Console(file=stream, force_terminal=True, width=120, highlight=False))
    bar.on_start(20, 5)
    bar.on_run("dense, seed 1", 10)
    bar.on_update(10)
    bar.on_end("dense, seed 1", "validation 1.5")
    bar.close()
    assert "15/20" in stream.getvalue()
    assert "validation 1.5" in stream.getvalue()
    assert not isinstance(watching(io.StringIO()), Bar)
