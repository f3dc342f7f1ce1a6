"""Pages hold the figures of their records, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moestro.bench.page import MISSING, fill, filled, pictures
from moestro.bench.record import summed
from moestro.core.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "<!-- record: " in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_equal_their_records(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == filled(page), "run moestro.bench.page.fill on it"
    for source, target in pictures(page).items():
        assert source.read_bytes() == target.read_bytes()


def test_there_is_a_page() -> None:
    assert "performance.md" in {page.name for page in PAGES}


def record(ms: float) -> dict[str, Any]:
    sizes = {"tokens": 64, "dim": 512, "width": 256, "experts": 32, "top_k": 4}
    rows: dict[str, Any] = {"moestro": {"seconds": [ms / 1e3], "errors": {"y": 1e-7}}}
    regime = {"kind": "forward", "routing": "balanced", "ours": "moestro", **sizes, "rows": rows}
    machine = {"processor": "P", "cores": 2, "threads": 2, "instruction_set": "AVX2", "device": "cpu"}
    return {
        "what": "time of a layer",
        "when": "a day",
        "rounds": 1,
        "machine": {**machine, "command": "moestro bench layer", "kernels": "avx2", "versions": _VERSIONS},
        "load_average": {"before": [0.1, 0.1, 0.1], "after": None},
        "peak_memory": {"process": 2**30},
        "regimes": {"forward, T 64": regime | summed(regime)},
        "goals": [],
    }


_VERSIONS = {"torch": "2", "transformers": None}


def test_fill(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "layer"
    folder.mkdir(parents=True)
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    mark = "<!-- record: ../results/layer/record.json {} -->\nold 1.23\n<!-- end of record -->\n"
    page.write_text("Before.\n" + "".join(mark.format(p) for p in ("about", "tables balanced", "picture")) + "After.\n")
    fill(page)
    assert page.read_text().count(MISSING) == 3
    (folder / "record.json").write_text(json.dumps(record(4.56)))
    (folder / "picture.svg").write_text("<svg/>")
    assert page.read_text() != filled(page)
    fill(page)
    text = page.read_text()
    assert text == filled(page)
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "| moestro | 4.56 (4.56 to 4.56) |" in text
    assert "`moestro bench layer`: P, 2 cores, 2 threads" in text
    assert "1.23" not in text
    assert (page.parent / "assets" / "layer.svg").read_text() == "<svg/>"
    page.write_text(text.replace("4.56", "3.56"))
    assert page.read_text() != filled(page)
    page.write_text(mark.format("figures"))
    with pytest.raises(UserError, match="a record has no 'figures'"):
        filled(page)
