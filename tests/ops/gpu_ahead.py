"""Kernels compiled without a GPU: what a problem would launch, compiled for a target, with what the assembler says."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moestro.ops.expert_mlp.gpu import run
from moestro.ops.expert_mlp.gpu.blocks import Blocks
from moestro.ops.expert_mlp.problem import Problem, Wanted

SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}  # bytes that one block may have


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel for one target. spilled: bytes of stack per thread."""

    name: str
    warps: int
    registers: int
    spilled: int
    shared: int
    cubin: int
    instructions: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


def problem(
    dtype: torch.dtype, *, T: int, K: int, E: int, D: int, F: int, activation: str = "silu", gated: bool = True
) -> Problem:
    """Shapes only; plain experts have biases."""

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    return Problem(
        x=floats(T, D),
        first=floats(E, 2 * F if gated else F, D),
        down=floats(E, D, F),
        offsets=integers(E + 1),
        activation=activation,
        gated=gated,
        unit=integers(T * K),
        slot=integers(T * K),
        inverse=integers(T, K),
        weight=torch.empty(T, K, device="meta"),
        first_bias=None if gated else floats(E, F),
        down_bias=None if gated else floats(E, D),
    )


def launches(p: Problem, sizes: Blocks) -> list[Launch]:
    """All that a forward and a backward pass would launch, without launching it."""
    found: list[Launch] = []

    def note(kernel: Any, grid: Any, args: tuple[Any, ...], constants: dict[str, Any], **options: int) -> None:
        assert all(n > 0 for n in grid)
        found.append(Launch(kernel, args, constants, {**options, "enable_fp_fusion": True}))

    with mock.patch.object(run, "launch", note):
        y, hidden = run.forward(p, True, sizes)
        wanted = Wanted(first_bias=p.first_bias is not None, down_bias=p.down_bias is not None)
        run.backward(p, hidden, torch.empty_like(y), wanted, sizes)
    return found


class _Driver:
    """A GPU to compile for and not to start anything on; every capability is a device of its own."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compiled(launch: Launch, capability: int) -> Compiled:
    """The kernel that the launch would start: bound and specialised by Triton itself, for a GPU that is not there."""
    with mock.patch.object(driver, "_active", _Driver(capability)):
        result = launch.kernel.warmup(*launch.args, grid=(1,), **launch.constants, **launch.options)
    cubin = result.asm["cubin"]
    registers, spilled = _resources(cubin)
    used = frozenset(re.findall(r"\b(wgmma|mma\.sync|cp\.async\.c[ag]|tcgen05\.mma|ld\.global\S*)", result.asm["ptx"]))
    return Compiled(
        launch.kernel.__name__,
        result.metadata.num_warps,
        registers,
        spilled,
        result.metadata.shared,
        len(cubin),
        used,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack per thread: there is none unless registers were spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert found is not None, said.stdout
    return int(found[1]), int(found[2])
