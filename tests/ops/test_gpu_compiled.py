"""The GPU kernels compiled for GPUs that are not there: they fit, nothing spills, tensor cores are used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from moestro.ops.expert_mlp import ACTIVATIONS
from moestro.ops.expert_mlp.gpu.blocks import blocks
from ops.gpu_ahead import SHARED, Compiled, compiled, launches, problem

OLMOE = dict(T=16384, K=8, E=64, D=2048, F=1024)
PRODUCTS = {"first_kernel", "product_kernel", "hidden_grad_kernel", "outer_kernel"}
BIASED = {"first_kernel", "product_kernel", "hidden_grad_kernel", "columns_kernel"}
TENSOR_CORES = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile anew."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def check(
    capability: int,
    dtype: torch.dtype = torch.bfloat16,
    rows_per_expert: float | None = None,
    only: set[str] | None = None,
    activation: str = "silu",
    gated: bool = True,
    **shape: int,
) -> list[Compiled]:
    shape = OLMOE | shape
    p = problem(dtype, activation=activation, gated=gated, **shape)
    sizes = blocks(divmod(capability, 10), dtype, shape["D"], shape["F"], rows_per_expert)  # type: ignore[arg-type]
    found = [
        compiled(launch, capability) for launch in launches(p, sizes) if only is None or launch.kernel.__name__ in only
    ]
    for kernel in found:
        assert kernel.cubin > 1000, kernel
        assert kernel.shared <= SHARED[capability], kernel
        assert kernel.registers * 32 * kernel.warps <= 65536, kernel
        assert kernel.spilled == 0, kernel
        if kernel.name in PRODUCTS and dtype != torch.float32 and capability in TENSOR_CORES:
            assert TENSOR_CORES[capability] in kernel.instructions, kernel
    return found


@pytest.mark.parametrize("capability", [80, 90])
def test_gated_experts(capability: int) -> None:
    kernels = check(capability, rows_per_expert=2048)
    assert {k.name for k in kernels} >= PRODUCTS | {"schedule_kernel", "combine_kernel", "dots_kernel"}
    for kernel in kernels:
        if kernel.name in PRODUCTS:  # a loop without copies in flight, of 16 bytes each, would wait for every load
            assert "cp.async.cg" in kernel.instructions, kernel
            assert "cp.async.ca" not in kernel.instructions, kernel
            assert kernel.shared > 2**16, kernel


@pytest.mark.parametrize("capability", [80, 90])
def test_plain_experts_with_biases(capability: int) -> None:
    kernels = check(capability, only=BIASED, activation="gelu", gated=False)
    assert {k.name for k in kernels} == BIASED


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 89, 100])
def test_other_gpus(capability: int) -> None:
    check(capability, rows_per_expert=2048)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 20, 40])
def test_short_tiles(capability: int, rows: int) -> None:
    p = problem(torch.bfloat16, **OLMOE)
    sizes = blocks(divmod(capability, 10), torch.bfloat16, 2048, 1024, rows)  # type: ignore[arg-type]
    for launch in launches(p, sizes):
        kernel = compiled(launch, capability)
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= SHARED[capability], kernel


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4096, 14336, 8, 2), (2048, 768, 128, 8), (200, 72, 5, 2), (65, 33, 3, 1)])
@pytest.mark.parametrize("capability", [80, 90])
def test_other_shapes(shape: tuple[int, int, int, int], capability: int) -> None:
    D, F, E, K = shape
    check(capability, D=D, F=F, E=E, K=K)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("capability", [80, 90])
def test_every_activation(activation: str, capability: int) -> None:
    only = {"first_kernel", "hidden_grad_kernel"}
    check(capability, torch.float16, only=only, activation=activation)
    check(capability, torch.float16, only=only, activation=activation, gated=False)


@pytest.mark.slow
def test_fp32_without_tensor_cores() -> None:
    check(80, torch.float32)
