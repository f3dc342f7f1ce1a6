"""The code on every page of the documentation and in the README runs, block after block, page by page."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from moestro.tasks.config import Text
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
