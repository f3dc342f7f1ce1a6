"""Two processes started by torchrun against one: the same losses, gradient norms and counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moestro.train.ranks import Ranks
from moestro.train.run import run
from train.train_cases import Steps, rows, strong, text, tiny, with_moe

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder in which two ranks trained."""
    folder = tmp_path_factory.mktemp("ranks")
    text(folder)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*launch, str(HERE / "rank_worker.py"), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, said = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
            raise
    assert process.returncode == 0, said[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process, without micro-batches."""
    folder = tmp_path_factory.mktemp("alone")
    seen = Steps()
    config = with_moe(tiny(folder, batch_size=7, steps=20, eval_every=10), **strong(0.5))
    run(config, out=folder / "run", progress=seen)
    return folder / "run", [{path: c.tolist() for path, c in info.counts.items()} for info in seen.infos]


def test_losses_norms_and_counts_of_twenty_steps_equal_one_process(ranks, alone):
    folder, counts = alone
    assert json.loads((ranks / "ranks-counts.json").read_text()) == counts
    mine, theirs = rows(ranks / "ranks"), rows(folder)
    assert [r["step"] for r in mine] == [r["step"] for r in theirs]
    for a, b in zip(mine, theirs):
        for name in {"loss", "nats", "grad_norm", "bits_per_byte"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)
        for name, value in a.get("terms", {}).items():
            assert value == pytest.approx(b["terms"][name], rel=1e-5), (a["step"], name)
        assert a["kind"] == b["kind"]
        assert a.get("layers") == b.get("layers") or a["kind"] == "eval"


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_resumes(ranks):
    for rank in (0, 1):
        said = json.loads((ranks / f"said-{rank}.json").read_text())
        assert said["stopped"] in (4, 5)
        assert said["resumed"]
    assert rows(ranks / "stopped") == rows(ranks / "ranks")  # same ranks: to the last bit


def test_what_fails_on_the_first_rank_is_said_by_all(ranks):
    for rank in (0, 1):
        said = json.loads((ranks / f"said-{rank}.json").read_text())
        assert "No space left on device" in said["full"]


def test_shares_cover_everything_once():
    for total in (2, 7, 64):
        parts = [Ranks(rank, 3, 0).share(total) for rank in range(3)]
        assert [start for start, _ in parts][1:] == [stop for _, stop in parts][:-1]
        assert (parts[0][0], parts[-1][1]) == (0, total)
