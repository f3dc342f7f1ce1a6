"""What the GPU kernels take, and where they are preferred to torch's grouped product."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..problem import Grads, Problem, Spec, Wanted

__all__ = ["backward", "forward", "gain", "obstacle", "supported"]

NAME = "triton"

# Assumed of a GPU of capability 9.0, NOT measured: products reach this many FLOP/s in torch's grouped_mm and this share
# of it in the kernels here (their loads are asynchronous copies, not TMA); memory moves this many bytes/s.
_PRODUCTS, _SHARE, _MEMORY = 600e12, 0.85, 2.7e12


def supported(spec: Spec) -> tuple[bool, str]:
    """Whether this backend takes such a problem, and why (not)."""
    if spec.device != "cuda":
        return False, f"runs on a CUDA device, not on {spec.device}"
    if spec.capability < (8, 0):
        return False, "needs a GPU of compute capability 8.0"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return False, f"{spec.dtype_name} products are for cuBLAS: the kernels use 16-bit tensor cores"
    if spec.unequal:
        return False, "the widths differ"
    if spec.clamped:
        return False, "has no clamped gated unit"
    if spec.gated and spec.biased:
        return False, "has no biases of gated experts"
    if spec.activation not in ACTIVATIONS:
        return False, f"does not know the activation {spec.activation}"
    if min(spec.rows, spec.dim, spec.width, spec.experts) == 0:
        return False, "there is nothing to compute"
    if spec.rows >= 2**31 or spec.experts >= 2**12:
        return False, "counts rows in 32 bits and keeps all experts' offsets in registers"
    if problem := obstacle():
        return False, problem
    if not spec.deterministic and _grouped_mm_is_fast(spec):
        saved, lost = gain(spec)
        if saved < lost:
            return (
                False,
                f"grouped_mm should be faster: {lost:.0f} ns lost in products, {saved:.0f} ns of copies saved per row",
            )
    return True, "gather, products, activation and combine in four kernels"


@functools.cache
def obstacle() -> str:
    """Why Triton cannot start kernels on this machine: it, a C compiler or a writable cache is missing; or ""."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # compiles and loads the part in C that starts kernels
    except Exception as problem:  # of many types, by version and cause
        return f"Triton cannot start kernels here: {str(problem).strip().partition(chr(10))[0]}"
    return ""


def gain(spec: Spec) -> tuple[float, float]:
    """Nanoseconds per row and forward pass: (saved by not writing what is fused, lost in slower products).

    Arithmetic on assumed rates, not a measurement. Saved: writing and reading the gathered row (2 * 2D bytes), and
    reading the pre-activations (2F gated, F plain) and writing and reading act(gate) (2F), 2 bytes each. Lost: the
    products' FLOPs, 2DF per matrix, at the share of grouped_mm's rate.
    """
    matrices = 3 if spec.gated else 2
    copied = 2 * (2 * spec.dim + (matrices - 1) * spec.width + 2 * spec.width)
    flops = 2 * matrices * spec.dim * spec.width
    return copied / _MEMORY * 1e9, flops / _PRODUCTS * (1 / _SHARE - 1) * 1e9


def _grouped_mm_is_fast(spec: Spec) -> bool:
    """Where torch's grouped product has a kernel of its own: bf16, aligned, 9.0 and 10.0. Elsewhere it is a loop."""
    aligned = spec.dim % 8 == 0 and spec.width % 8 == 0
    return spec.capability[0] in (9, 10) and spec.dtype == torch.bfloat16 and aligned


def forward(p: Problem, save: bool) -> tuple[Tensor, Tensor]:
    """y [T, D] (or [R, D] of rows) and the values before the activation, [R, 2F] gated or [R, F], if `save`."""
    from . import run

    return run.forward(p, save)


def backward(p: Problem, hidden: Tensor, grad: Tensor, wanted: Wanted) -> Grads:
    """The gradients that are wanted, from what `forward` saved and the gradient of y."""
    from . import run

    return run.backward(p, hidden, grad, wanted)
