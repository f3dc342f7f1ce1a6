"""Kill -9 at random moments: the script that does it, and that it can tell two runs apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

from moestro.testing.kills import compare
from moestro.train.run import run
from train.train_cases import rows, tiny


def test_five_kills_leave_the_run_what_it_is(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "moestro.testing.kills", "--n", "5", "--steps", "16", "--out", str(tmp_path / "r.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["equal"]
    assert record["kills"] == len(record["moments"]) == 5


def test_the_comparison_sees_one_number_and_one_bit(tmp_path):
    run(tiny(tmp_path, steps=3, eval_every=3), out=tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert compare(tmp_path / "a", tmp_path / "b") == []
    metrics = tmp_path / "b" / "metrics.jsonl"
    loss = rows(tmp_path / "b", "step")[1]["nats"]
    metrics.write_text(metrics.read_text().replace(str(loss), str(loss * (1 + 1e-15)), 1))
    (found,) = compare(tmp_path / "a", tmp_path / "b")
    assert str(loss) in found
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert any("rows of metrics" in line for line in compare(tmp_path / "a", tmp_path / "b"))
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    model = tmp_path / "b" / "model.safetensors"
    content = model.read_bytes()
    model.unlink()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert compare(tmp_path / "a", tmp_path / "b") == ["run: other weights"]
