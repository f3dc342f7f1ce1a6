"""CPU kernels run in torch's own threads, and two processes may compile them at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moestro.ops.native import build, cache
from ops.build_cases import kept, script
from ops.native_cases import compiles

pytestmark = pytest.mark.usefixtures("fresh")


ALONE = """
import json, os, sys
from pathlib import Path
import torch
from moestro.ops.native import build, library
source, threads = Path(sys.argv[1]), int(sys.argv[2])
build.SOURCE = source
library.SIGNATURES = {name: library.SIGNATURES[name] for name in ("moestro_abi", "moestro_threads")}
torch.set_num_threads(threads)
x = torch.ones(1 << 20)
(x * 2).sum()  # torch's own pool exists now

def runtimes():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if "libgomp" in line or "omp5" in line or "libomp" in line})

def pool():
    return len(os.listdir("/proc/self/task"))

before = pool(), runtimes()
got = build.load()
ran = {n: got and got.moestro_threads(n) for n in (1, threads, torch.get_num_threads())}
torch.set_num_threads(1)
one = got and got.moestro_threads(torch.get_num_threads())
print(json.dumps({"reason": build.reason(), "before": before, "ran": ran, "one": one, "after": (pool(), runtimes())}))
"""


def start(threads: int, **environment: str) -> subprocess.Popen[str]:
    kept_out = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))}
    line = [sys.executable, "-c", ALONE, str(build.SOURCE), str(threads)]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env={**kept_out, **environment})


def answer(process: subprocess.Popen[str]) -> tuple[dict, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out), err


@compiles
def test_threads_are_torch_s_own() -> None:
    got, _ = answer(start(2))
    assert got["ran"] == {"1": 1, "2": 2}
    assert got["one"] == 1
    assert len(got["before"][1]) >= 1
    assert got["after"] == got["before"]


@compiles
def test_two_processes_at_once(tmp_path: Path) -> None:
    """The compiler of either waits until the other's has begun, so that neither finds the other's library."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    body = f"""
case "$*" in *" -c "*)
  touch {meeting}/$$
  n=0
  while [ "$(ls {meeting} | wc -l)" -lt 2 ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done;;
esac
exec gcc "$@"
"""
    both = [start(1, CC=script(tmp_path / "cc", body)) for _ in range(2)]
    answers = [answer(process) for process in both]
    for got, err in answers:
        assert re.fullmatch(r"avx\w+, compiled in \d+\.\d s", got["reason"])
        assert got["one"] == 1
        assert len(err.splitlines()) == 1
    assert len(list(meeting.iterdir())) == 2
    (file,) = kept()
    assert cache.intact(file)
