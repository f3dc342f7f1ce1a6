"""`moestro demo upcycle`, small: what it leaves, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moestro.bench import upcycle
from moestro.convert import load
from moestro.convert.receipt import read, verify

from .conftest import TEXT, command


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    root = tmp_path_factory.mktemp("demo")
    (root / "text.py").write_text(TEXT)
    small = upcycle.DENSE.model.replace(dim=16, num_layers=2, context=128)
    dense = upcycle.DENSE.replace(model=small, batch_size=4, seq_len=32, eval_windows=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upcycle, "DENSE", dense)
        patch.setattr(upcycle, "NEW_TOKENS", 12)
        status, out, err = command(
            "demo", "upcycle", "--out", str(root / "out"), "--data", str(root / "text.py"), "--steps", "8", "--json"
        )
    assert status == 0, err
    return root / "out", out, err


def test_every_arm_is_there_at_equal_flops(shown: tuple[Path, str, str]) -> None:
    folder, out, err = shown
    record = json.loads(out)
    assert json.loads((folder / "record.json").read_text()) == record
    arms = record["arms"]
    assert set(arms) == {"dense", *upcycle.METHODS}
    for name, arm in arms.items():
        assert arm["flops"] == pytest.approx(arms["dense"]["flops"], rel=0.15), name  # whole steps, of few
        assert arm["curve"][-1]["bits_per_byte"] == arm["bits_per_byte"]
    assert arms["granular"]["steps"] == 8 > arms["copy"]["steps"]
    assert record["best"] == min(upcycle.METHODS, key=lambda n: arms[n]["bits_per_byte"])
    assert "Trained on from one dense model" in err
    assert (folder / "picture.png").stat().st_size > 1000


def test_receipts_belong_to_the_models_beside_them(shown: tuple[Path, str, str]) -> None:
    for name in upcycle.METHODS:
        receipt = read(shown[0] / name)
        verify(load(shown[0] / name).model, receipt)
        if name != "reinit":
            assert receipt.exact
            assert receipt.measured.relative < 1e-5


def test_transformers_alone_writes_the_same(shown: tuple[Path, str, str]) -> None:
    made = json.loads(shown[1])["exported"]
    assert (made["loaded_as"], made["tokens_equal"]) == ("MixtralForCausalLM", 12)
    assert made["text"].startswith(upcycle.PROMPT)


def test_what_cannot_be_is_one_line(shown: tuple[Path, str, str], tmp_path: Path) -> None:
    status, _, err = command("demo", "upcycle", "--out", str(shown[0]))
    assert (status, len(err.strip().splitlines())) == (2, 1)
    assert "exists already" in err
    said = command("demo", "upcicle")[2]
    assert said.startswith("moestro: error: unknown demonstration 'upcicle' (did you mean 'upcycle'?)")
    status, out, _ = command("demo")
    assert status == 0
    assert "upcycle" in out
