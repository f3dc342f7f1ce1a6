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


@pytest.mark.parametrize("group", ["routings", "kinds", "shapes", "dtypes", "operation"])
def test_outputs_and_gradients(group: str) -> None:
    cases = interpreted(group)
    assert len(cases) >= 4
    for case, errors in cases.items():
        assert {"output", "x", "first", "down"} <= set(errors) or case == "no gradient"
        for tensor, error in errors.items():
            assert error <= TOLERANCE.get(case, 2e-6), f"{case}, {tensor}: relative error {error:.3g}"


def test_promises() -> None:
    """Idle experts' zeros, nothing kept without need, single gradients, strides, a unit alone, rows of others."""
    cases = interpreted("promises")
    assert len(cases) == 6
    for promise, broken in cases.items():
        assert set(broken.values()) == {0.0}, f"{promise}: entries that differ: {broken}"


def interpreted(group: str) -> dict[str, dict[str, float]]:
    done = subprocess.run(
        [sys.executable, "-m", "ops.gpu_interpreted", group],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
