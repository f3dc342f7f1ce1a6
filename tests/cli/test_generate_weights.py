"""`moestro generate --weights`: bytes by kind, bits per byte, and text from packed weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moestro.train.held_out import held_out, validate
from moestro.train.load import load

from .conftest import Trained, command

KINDS = ("bf16", "int8", "int4")


def generate(run: Path, *more: str) -> tuple[int, str, str]:
    return command("generate", str(run), "--prompt", "def f", "--max-tokens", "8", "--temperature", "0", *more)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_bits_are_said(trained: Trained, kind: str) -> None:
    status, out, err = generate(trained.folder, "--weights", kind)
    assert (status, out.count("\n") >= 1) == (0, True)
    for words in (
        f"weights in {kind}",
        "expert",
        "attention",
        "embedding",
        "router",
        "all",
        f"bits per byte with {kind}",
    ):
        assert words in err
    status, said, again = generate(trained.folder, "--weights", kind, "--json")
    assert (status, again) == (0, err)
    found = json.loads(said)
    assert found["text"] == out.removesuffix("\n")
    weights = found["weights"]
    assert weights["kind"] == kind
    before, after = weights["bytes"]["before"], weights["bytes"]["after"]
    assert set(before) == set(after)
    assert after["expert"] < 0.6 * before["expert"]
    assert (after["router"], after["embedding"]) == (before["router"], before["embedding"])
    assert any(path.endswith("ffn.experts") for path in weights["packed"])
    bits = weights["bits_per_byte"]
    assert f"{bits[kind]:.4f} bits per byte with {kind}, {bits['fp32']:.4f} with fp32" in err
    assert bits[kind] != bits["fp32"]
    assert abs(bits[kind] - bits["fp32"]) < {"bf16": 0.01, "int8": 0.01, "int4": 0.1}[kind]


def test_the_fp32_figure_is_that_of_training(trained: Trained) -> None:
    loaded = load(trained.folder)
    said: list[tuple[int, int]] = []
    bits = validate(loaded, held_out(loaded), lambda *progress: said.append(progress))
    rows = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    best = min(row["bits_per_byte"] for row in rows if row.get("bits_per_byte") is not None)
    assert bits == pytest.approx(best, rel=1e-6)
    assert said[-1][0] == said[-1][1]


def test_fp32_says_nothing(trained: Trained) -> None:
    plain = generate(trained.folder)
    assert plain == generate(trained.folder, "--weights", "fp32")
    assert plain[2] == ""
    assert "weights" not in json.loads(generate(trained.folder, "--json")[1])


def test_without_the_text(trained: Trained, tmp_path: Path) -> None:
    status, _, err = generate(trained.folder, "--weights", "int8", "--no-measure")
    assert (status, "weights in int8" in err, "validation" in err) == (0, True, False)
    moved = tmp_path / "run"
    shutil.copytree(trained.folder, moved)
    cache = trained.folder.parent / "cache"
    hidden = cache.rename(tmp_path / "hidden")
    try:
        status, said, err = generate(moved, "--weights", "int8", "--json")
    finally:
        hidden.rename(cache)
    assert status == 0
    assert "validation: not measured: the tokenised text of this run is not in" in err
    weights = json.loads(said)["weights"]
    assert (weights["bits_per_byte"], "not in" in weights["bits_per_byte_missing"]) == (None, True)


def test_the_dense_twin(trained: Trained) -> None:
    status, said, err = generate(trained.folder / "dense", "--weights", "int4", "--json")
    assert status == 0, err
    weights = json.loads(said)["weights"]
    assert weights["bytes"]["after"]["dense"] < 0.3 * weights["bytes"]["before"]["dense"]
    assert weights["bits_per_byte"] is not None


def test_states(trained: Trained) -> None:
    for verb in (("generate", "--prompt", "x", "--max-tokens", "2"),):
        assert command(verb[0], str(trained.folder), *verb[1:], "--state", "last")[0] == 0
    status, _, err = generate(trained.folder, "--weights", "best")
    assert status == 2
    assert "--weights" in err
