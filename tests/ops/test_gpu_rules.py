"""What the GPU backend takes, when it is chosen, and its block sizes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from moestro.ops.expert_mlp import ACTIVATIONS, choose, gpu
from moestro.ops.expert_mlp.gpu import backend
from moestro.ops.expert_mlp.gpu.backend import gain
from moestro.ops.expert_mlp.gpu.blocks import Block, Blocks, blocks
from moestro.ops.expert_mlp.problem import Spec

AMPERE = Spec(
    device="cuda", dtype=torch.bfloat16, rows=131072, dim=2048, width=1024, experts=64, capability=(8, 0)
)  # OLMoE, 16k tokens
HOPPER = dataclasses.replace(AMPERE, capability=(9, 0))
MIXTRAL = dataclasses.replace(HOPPER, dim=4096, width=14336, experts=8)


_OBSTACLE = backend.obstacle


@pytest.fixture(autouse=True)
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules are those of a machine with Triton and a GPU."""
    monkeypatch.setattr(backend, "obstacle", lambda: "")


REFUSED = {
    "the CPU": dict(device="cpu"),
    "an old GPU": dict(capability=(7, 5)),
    "fp32": dict(dtype=torch.float32),
    "unequal widths": dict(unequal=True),
    "an unknown activation": dict(activation="swoosh"),
    "no rows": dict(rows=0),
    "no experts": dict(experts=0),
    "too many rows": dict(rows=2**31),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_reason(what: str) -> None:
    able, reason = gpu.supported(dataclasses.replace(AMPERE, **REFUSED[what]))
    assert not able
    assert reason
    assert gpu.supported(AMPERE)[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("spec", [AMPERE, HOPPER])
def test_chosen_before_torch(activation: str, spec: Spec) -> None:
    for kind in (dict(), dict(gated=False, biased=True), dict(mixture=False), dict(dtype=torch.float16)):
        wanted = dataclasses.replace(spec, activation=activation, **kind)
        assert choose.choose(wanted) is gpu
        assert f"{gpu.NAME}: chosen" in choose.explain(wanted)


def test_wide_experts_go_to_grouped_mm_where_it_has_a_kernel() -> None:
    able, reason = gpu.supported(MIXTRAL)
    assert not able
    assert "grouped_mm" in reason
    for other in (
        dict(capability=(8, 0)),
        dict(dtype=torch.float16),
        dict(deterministic=True),
        dict(width=14337),
    ):
        assert gpu.supported(dataclasses.replace(MIXTRAL, **other))[0]


def test_gain_is_counted_bytes_and_flops() -> None:
    """D 1000, F 500: 4 kB of rows and 4 kB of hidden values at 2.7 TB/s; 3 MFLOP at 600 TFLOP/s and 85 % of it."""
    saved, lost = gain(dataclasses.replace(HOPPER, dim=1000, width=500))
    assert saved == pytest.approx((4 * 1000 + 4 * 500 + 4 * 500) / 2.7e12 * 1e9)
    assert lost == pytest.approx(2 * 3 * 1000 * 500 / 600e12 * 0.15 / 0.85 * 1e9)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(backend, "obstacle", _OBSTACLE.__wrapped__)
    assert gpu.supported(AMPERE) == (False, "Triton is not installed")
    assert choose.choose(AMPERE) is not gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU to start kernels on")
def test_without_a_gpu_to_start_kernels_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    monkeypatch.setattr(backend, "obstacle", _OBSTACLE.__wrapped__)
    able, reason = gpu.supported(AMPERE)
    assert not able
    assert reason.startswith("Triton cannot start kernels here: ")
    assert "\n" not in reason
    assert choose.choose(AMPERE) is not gpu


def test_the_package_works_where_triton_cannot_be_imported() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import moestro, torch\n"
        "from moestro.ops.expert_mlp import choose, gpu\n"
        "layer = moestro.MoE(8, 4)\n"
        "layer(torch.randn(2, 3, 8)).sum().backward()\n"
        "print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "done", done.stderr


def test_blocks_are_a_function_of_shape_and_gpu() -> None:
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        for rows in (None, 0.5, 1, 20, 100, 5000):
            for dim, width in ((2048, 1024), (64, 16), (7, 5), (1, 1)):
                found = blocks(capability, torch.bfloat16, dim, width, rows)
                assert found.first.rows == found.product.rows == found.hidden.rows
                for field in dataclasses.fields(Blocks):
                    block: Block = getattr(found, field.name)
                    for size in (block.rows, block.cols, block.depth):
                        assert size >= 16
                        assert size & (size - 1) == 0
                    assert block.warps in (4, 8)


def test_deterministic_blocks_do_not_see_the_number_of_rows() -> None:
    tall = blocks((9, 0), torch.bfloat16, 2048, 1024, None)
    assert tall == blocks((9, 0), torch.bfloat16, 2048, 1024, 10000)
    assert tall.first.rows > blocks((9, 0), torch.bfloat16, 2048, 1024, 10).first.rows
