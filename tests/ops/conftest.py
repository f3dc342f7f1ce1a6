"""What several tests of operations run with."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moestro.ops.grouped.choose import BACKENDS
from moestro.ops.native import build, library
from moestro.ops.native.signatures import SIGNATURES

PROBE = ("moestro_abi", "moestro_threads")


@pytest.fixture(params=[(), ("native",), ("native", "grouped_mm")], ids=["native", "grouped_mm", "loop"])
def each_grouped_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped products by every backend in turn: the ones before it are taken away."""
    left = tuple(backend for backend in BACKENDS if backend.NAME not in request.param)
    monkeypatch.setattr(importlib.import_module("moestro.ops.grouped.choose"), "BACKENDS", left)


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
