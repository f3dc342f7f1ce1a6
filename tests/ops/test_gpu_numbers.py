"""The GPU kernels against the oracle, by Triton's interpreter: routings, kinds, shapes, dtypes and promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

# The interpreter cuts off bits where it makes bf16, a GPU rounds: errors here are twice those of a GPU.
TOLERANCE = {"bfloat16": 2e-2, "bfloat16 plain": 2e-2, "bfloat16 weights": 2e-2, "float16": 1e-3}


@pytest.mark.parametrize(
    "groups", [("routings", "promises"), ("kinds", "operation"), ("shapes", "dtypes")], ids="-".join
)
def test_outputs_and_gradients(groups: tuple[str, ...]) -> None:
    """Errors against the oracle; of promises, numbers of entries that break them.

    Promises: zeros for idle experts, nothing kept without need, single gradients, strides, a unit alone, others' rows.
    """
    found = interpreted(groups)
    for group in groups:
        assert len(found[group]) >= 4
        for case, errors in found[group].items():
            tolerance = 0.0 if group == "promises" else TOLERANCE.get(case, 2e-6)
            assert errors
            for tensor, error in errors.items():
                assert error <= tolerance, f"{group}, {case}, {tensor}: {error:.3g} over {tolerance:.3g}"


def interpreted(groups: tuple[str, ...]) -> dict[str, dict[str, dict[str, float]]]:
    done = subprocess.run(
        [sys.executable, "-m", "ops.gpu_interpreted", *groups],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
