"""A user with an empty cache, and compilers of ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moestro.ops.native import build, library


def again() -> library.Library | None:
    """What the next process would get."""
    build._first.cache_clear()
    return build.load()


def kept() -> list[Path]:
    """All that lies in the cache folder."""
    return sorted((Path(os.environ["XDG_CACHE_HOME"]) / "moestro" / "native").glob("*"))


def script(path: Path, body: str) -> str:
    """A compiler of ours."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capfd.readouterr()
    assert out == ""
    return err.splitlines()
