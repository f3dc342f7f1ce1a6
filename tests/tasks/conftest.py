"""Files in the formats of the originals, written by the tests themselves."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Put = Callable[[str, Any], None]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Writes files below MOESTRO_DATA: text as it is, lists as JSON lines, others as JSON; .gz is gzipped."""
    monkeypatch.setenv("MOESTRO_DATA", str(tmp_path))

    def write(name: str, value: Any) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, list):
            value = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value)
        elif not isinstance(value, str):
            value = json.dumps(value)
        data = value.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

    return write


def rows_77() -> list[dict[str, str]]:
    rows = [{"split": "train", "text": f"{label} {i}", "label": label} for label in ("lost", "card") for i in range(20)]
    return [*rows, {"split": "test", "text": "where?", "label": "lost"}]
