"""A trained run that the verbs are tried on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from moestro.cli.app import run

TEXT = "".join(f"def f{i}(x, y={i}):\n    # a line of code number {i}\n    return x + {i} * y\n\n" for i in range(400))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run folder, the text it learned from, what training printed, and the options that make it."""

    folder: Path
    text: Path
    out: str
    err: str
    line: list[str]

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def command(*line: str) -> tuple[int, str, str]:
    """(status, stdout, stderr) of one command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(line)
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("cli")
    text = root / "text.py"
    text.write_text(TEXT)
    line = ["train", "tiny", "--data", str(text), "--data.cache", str(root / "cache"), "--steps", "6"]
    line += ["--eval-every", "3", "--eval-windows", "8", "--device", "cpu", "--recording.every", "3"]
    status, out, err = command(*line, "--out", str(root / "run"), "--json")
    assert status == 0, err
    return Trained(root / "run", text, out, err, line)
