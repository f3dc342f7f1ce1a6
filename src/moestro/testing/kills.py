"""Kill a training at random moments, resume it, and compare with one that was left alone: bit by bit.

    python -m moestro.testing.kills --n 100 --out results/kill-resume.json

A parent that never computes forks one child per attempt; the child trains, the parent kills it with SIGKILL at a
random moment (during reading, steps, evaluations, saves or the report) and forks the next, which resumes. Once a run
is through, every logged number except times, and the weights, must equal those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.files import seal
from ..moe.config import MoELayer
from ..routers.config import Router, TopK
from ..tasks.config import Text
from ..train.config import TrainRun
from ..train.files import write_json
from ..train.layout import Layout
from ..train.log import read_rows
from ..train.models import language_model
from ..train.presets import preset
from ..train.run import run

__all__ = ["Kill", "cases", "compare", "main"]

TIMES = ("seconds", "tokens_per_second")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill. after: seconds after the child began. rows: rows of metrics that the run had by then."""

    case: str
    run: int
    after: float
    rows: int


def cases(folder: Path, steps: int, report: bool = False) -> dict[str, TrainRun]:
    """The runs that are disturbed: the tiny preset with its twin, and one of top_k 4; on a text made here."""
    text = folder / "text.txt"
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 7))) for _ in range(200)]
    text.write_text("\n".join(" ".join(draw.choices(words, k=8)) for _ in range(800)), encoding="utf-8")
    data = Text(path=str(text), cache=str(folder / "cache"))
    tiny = preset("tiny").replace(
        data=data, steps=steps, threads=1, eval_every=max(2, steps // 4), save_every=2, eval_windows=8, seq_len=16
    )
    tiny = tiny.replace(report=report, tensorboard=report)
    layer = language_model(tiny.model, "the tiny preset").moe
    assert isinstance(layer, MoELayer)
    assert isinstance(layer.router, Router)
    four = layer.replace(num_experts=8, router=layer.router.replace(select=TopK(k=4)))
    return {"tiny": tiny, "top_k 4": tiny.replace(model=tiny.model.replace(moe=four), twin=False, micro_batch=3)}


def compare(left_alone: Path, disturbed: Path) -> list[str]:
    """What differs between two runs of the same settings; an empty list when nothing does."""
    found: list[str] = []
    for name in ("", "dense"):
        a, b = Layout(left_alone / name), Layout(disturbed / name)
        if not a.manifest.is_file():
            continue
        rows_a, rows_b = ([_without_times(r) for r in read_rows(x.metrics)] for x in (a, b))
        if len(rows_a) != len(rows_b):
            found.append(f"{name or 'run'}: {len(rows_a)} rows of metrics against {len(rows_b)}")
        found += [f"{name or 'run'}: {x} against {y}" for x, y in zip(rows_a, rows_b) if x != y][:3]
        if seal(a.model) != seal(b.model):
            found.append(f"{name or 'run'}: other weights")
    return found


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in TIMES}


def _child(config: TrainRun, out: Path) -> int:
    """Fork a child that trains into `out`, or resumes what is there; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run(config, out=out, resume=out.exists())
        status = 0
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
    finally:
        os._exit(status)


def _left_alone(config: TrainRun, out: Path) -> float:
    """Train without disturbance, in a child; returns the seconds it took."""
    begin = time.monotonic()
    _, status = os.waitpid(_child(config, out), 0)
    if status:
        raise SystemExit(f"the undisturbed run failed (status {status})")
    return time.monotonic() - begin


def _disturb(
    case: str, number: int, config: TrainRun, out: Path, length: float, draw: random.Random, most: int
) -> list[Kill]:
    """One run, killed again and again at random moments (at most `most` times) until it is through."""
    kills: list[Kill] = []
    while True:
        pid = _child(config, out)
        moment = draw.uniform(0, 1.1 * length) if len(kills) < most else None
        end = time.monotonic() + (600.0 if moment is None else moment)
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                if status:
                    raise SystemExit(f"{case}, run {number}: resuming failed (status {status}) after {kills}")
                return kills
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if moment is None:
            raise SystemExit(f"{case}, run {number}: not through after ten minutes")
        metrics = out / "metrics.jsonl"
        rows = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        kills.append(Kill(case=case, run=number, after=round(moment, 3), rows=rows))


def main(args: Sequence[str]) -> int:
    """Kill and compare until there were `--n` kills; returns 0 when every run came out equal."""
    parser = argparse.ArgumentParser(
        prog="python -m moestro.testing.kills", description="Kill a training at random moments"
    )
    parser.add_argument("--n", type=int, default=5, help="kills in total")
    parser.add_argument("--steps", type=int, default=40, help="steps of every run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--per-run", type=int, default=3, help="most kills of one run")
    parser.add_argument("--report", action="store_true", help="let every run end with a report, too")
    parser.add_argument("--out", type=Path, help="write a JSON record there")
    said = parser.parse_args(args)
    importlib.import_module("moestro.train.finish")  # children find everything imported
    draw = random.Random(said.seed)
    kills: list[Kill] = []
    wrong: list[str] = []
    runs = 0
    with tempfile.TemporaryDirectory() as folder:
        made = cases(Path(folder), said.steps, said.report)
        length = {name: _left_alone(config, Path(folder, f"alone-{name}")) for name, config in made.items()}
        for runs, name in enumerate(itertools.cycle(made), 1):
            out = Path(folder, f"run-{runs}")
            most = min(said.per_run, said.n - len(kills))
            kills += _disturb(name, runs, made[name], out, length[name], draw, most)
            wrong += [f"{name}, run {runs}: {line}" for line in compare(Path(folder, f"alone-{name}"), out)]
            print(f"{len(kills)} kills in {runs} runs, {len(wrong)} differences", flush=True)  # noqa: T201
            if len(kills) >= said.n:
                break
    record = {
        "what": "kill -9 at random moments, then resume; logged numbers and weights against an undisturbed run",
        "command": f"python -m moestro.testing.kills --n {said.n} --steps {said.steps} --seed {said.seed}",
        "kills": len(kills),
        "runs": runs,
        "differences": wrong,
        "equal": not wrong,
        "steps": said.steps,
        "seed": said.seed,
        "moments": [dataclasses.asdict(k) for k in kills],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
    }
    if said.out is not None:
        write_json(said.out, record)
    for line in wrong:
        print(line, file=sys.stderr)  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
