"""The code on every page of the documentation and in the README runs, block after block, page by page."""

from __future__ import annotations

import itertools
import json
import re
import sys
import types
from pathlib import Path
from typing import Any, get_args

import pytest

from moestro.cli.app import VERBS
from moestro.convert.checkpoint import rules
from moestro.convert.config import METHODS
from moestro.convert.families import FAMILIES
from moestro.convert.hf.experts import Path as Path_of_experts
from moestro.models import published
from moestro.tasks import data as data_sets
from moestro.tasks.config import Text
from moestro.tasks.material import Examples
from moestro.train.presets import preset
from moestro.train.run import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line of the first statement, code) of every Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start(1)].count("\n"), m.group(1)) for m in BLOCK.finditer(text)]


def first_run(here: Path) -> None:
    """The run folder that pages speak of: runs/first."""
    (here / "text.txt").write_text("the cat sat on the mat; the dog sat on the log. " * 200)
    data = Text(path=str(here / "text.txt"), cache=str(here / "cache"))
    settings = preset("tiny").replace(steps=2, eval_windows=4, twin=False, report=False, data=data, device="cpu")
    run(settings, out=here / "runs" / "first")


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_code_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if any("runs/first" in code for _, code in blocks(page)):
        first_run(tmp_path)
    module = types.ModuleType(f"docs_{page.stem.replace('-', '_').lower()}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # configs name what they build by module
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for line, code in blocks(page):
        made = compile("\n" * line + code, str(page), "exec")  # a failure then shows the page's own line
        exec(made, module.__dict__)


def test_there_is_code_to_run() -> None:
    found = {page.name: len(blocks(page)) for page in PAGES}
    assert all(
        found[name] for name in ("README.md", "index.md", "add-a-router.md", "add-an-expert.md", "add-a-paper.md")
    )


def table(page: str, first: str) -> list[list[str]]:
    """The cells of the table whose header begins with `first`, without backticks."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows]


def test_every_family_is_on_its_page() -> None:
    assert sorted(row[0] for row in table("checkpoints.md", "`model_type`")) == sorted(FAMILIES)


def test_every_conversion_is_on_its_page() -> None:
    rows = table("conversions.md", "method")
    assert [(row[0], row[1]) for row in rows] == [(name, kind.__name__) for name, kind in METHODS.items()]
    for name, kind, *_, text in rows:
        if text in ("", "yes"):
            assert getattr(METHODS[name](), "reads_text", False) == (text == "yes"), kind


def test_the_receipt_on_its_page_is_that_of_the_code() -> None:
    """Measured figures and checksums differ between machines; all else is equal."""
    page = ROOT / "docs" / "conversions.md"
    text = page.read_text(encoding="utf-8")
    shown = json.loads(text.partition("```json\n")[2].partition("```")[0])
    made: dict[str, Any] = {}
    exec(blocks(page)[0][1], made)
    found = made["receipt"].to_dict()
    assert shown.keys() == found.keys()
    assert shown["checksums"].keys() <= found["checksums"].keys()
    assert shown["measured"].keys() == found["measured"].keys()
    for name in ("source", "positions", "unit", "against"):
        assert shown["measured"][name] == found["measured"][name]
    for said, row in zip(shown["layers"], found["layers"], strict=True):
        assert {**said, "distance": None} == {**row, "distance": None}
    rest = shown.keys() - {"checksums", "measured", "layers"}
    assert {name: shown[name] for name in rest} == {name: found[name] for name in rest}
    assert found["measured"]["relative"] < 1e-6


def test_every_kind_of_rule_is_on_its_page() -> None:
    kinds = {row[0].partition("(")[0] for row in table("add-a-family.md", "rule")}
    assert kinds == {name for name in rules.__all__ if issubclass(getattr(rules, name, object), rules.Rule)} - {"Rule"}


def test_data_sets_and_kinds_of_examples_are_on_their_page() -> None:
    rows = {row[0]: row for row in table("tasks.md", "config")}
    sets = {name: getattr(data_sets, name) for name in data_sets.__all__}
    found = {name: c for name, c in sets.items() if issubclass(c, data_sets.Data) and c.slug}
    assert {name: row[-1] for name, row in rows.items()} == {name: config.source for name, config in found.items()}
    kinds = {row[0]: row[1] for row in table("tasks.md", "`data`")}
    assert set(kinds) == {"Text", *(c.__name__ for c in Examples.__subclasses__())}
    for kind in Examples.__subclasses__():
        assert ", ".join(kind.fields) in kinds[kind.__name__]


def test_every_path_of_experts_is_on_its_page() -> None:
    assert [row[0] for row in table("transformers.md", "path")] == list(get_args(Path_of_experts))


def test_the_count_of_a_published_model_is_that_of_its_config() -> None:
    config = published("deepseek-v3")
    total, active = (f"{n / 1e9:.2f}B" for n in (config.num_params(), config.num_active_params()))
    text = " ".join((ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8").split())
    assert f"{total} parameters, {active} active" in text


def test_every_verb_is_in_both_tables() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "command-line.md"):
        text = page.read_text(encoding="utf-8")
        for verb in VERBS:
            assert re.search(rf"^\| `(moestro )?{verb}\b", text, re.MULTILINE), f"{page.name} lacks {verb}"


def test_the_readme_counts_families() -> None:
    assert len(FAMILIES) == 18  # one is our own
    assert "Seventeen families" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_readme_holds_the_commands() -> None:
    """CI runs the second line as it stands here."""
    lines = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    assert lines.count("pip install -e . && moestro train") == 1
    assert lines.count("pip install -e '.[test]' && pytest") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_part_is_in_the_annotated_tree() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in (ROOT / "src" / "moestro").iterdir():
        if folder.is_dir() and any(folder.glob("*.py")):
            assert f"{folder.name}/" in tree, f"README's tree lacks {folder.name}/"
