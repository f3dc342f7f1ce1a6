"""A user with an empty cache, and compilers of ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moestro.ops.native import build, library
from moestro.ops.native.signatures import SIGNATURES

PROBE = ("moestro_abi", "moestro_threads")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in a new process of a user with an empty cache; of the sources, only the small one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(build.SOURCE / "probe.c", source)
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(library, "SIGNATURES", {name: SIGNATURES[name] for name in PROBE})
    build._first.cache_clear()
    yield
    build._first.cache_clear()


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
