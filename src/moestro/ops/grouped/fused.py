"""The grouped product by `torch.nn.functional.grouped_mm`: one call for all groups, offsets stay on the device.

What has to be kept away from it, as found in torch 2.13: float64; strides that are no multiple of 16 bytes; expanded
gradients; fp32 under torch.compile (its meta function refuses); on the CPU bf16 (3 to 12 times slower than fp32). Rows
after the last offset are left uninitialised, and autocast does not reach it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from . import loop
from .spec import Spec

__all__ = ["CPU_KERNEL", "columns", "outer", "products", "supported", "transposed_products"]

NAME = "grouped_mm"
_ALIGNMENT = 16  # bytes
CPU_KERNEL = torch._C._dispatch_has_computed_kernel_for_dispatch_key("aten::_grouped_mm", "CPU")


def supported(spec: Spec) -> tuple[bool, str]:
    """Whether this backend takes such operands, and why (not)."""
    if spec.device not in ("cpu", "cuda"):
        return False, f"not tried on {spec.device}"
    if spec.device == "cpu" and not CPU_KERNEL:
        return False, f"torch {torch.__version__} has no kernel for the CPU"
    if spec.dtype == torch.float64:
        return False, "has no float64"
    if spec.device == "cpu" and spec.dtype != torch.float32:
        return False, f"{spec.dtype_name} is slow on the CPU"
    if spec.device == "cuda" and spec.dtype != torch.bfloat16:
        return False, "has kernels for bfloat16 only on CUDA"
    if spec.device == "cuda" and spec.capability < (8, 0):
        return False, "needs a GPU of compute capability 8.0"
    if spec.compiling and spec.dtype == torch.float32:
        return False, "cannot be compiled in fp32"
    if spec.rows == 0 or spec.experts == 0:
        return False, "there are no rows"
    for name, size in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        if size * spec.dtype.itemsize % _ALIGNMENT or size == 0:
            return False, f"{size} {name} of {spec.dtype_name} are no multiple of {_ALIGNMENT} bytes"
    return True, "one call for all experts"


def products(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """[R, I] x [E, O, I] -> [R, O]. Rows after the last offset come out as zeros."""
    out = grouped_mm(_aligned(rows), _aligned(weight).transpose(1, 2), offs=_ends(offsets))
    if bias is not None:
        expert = torch.bucketize(torch.arange(rows.shape[0], device=rows.device), offsets[1:], right=True)
        out += bias.index_select(0, expert.clamp_max_(weight.shape[0] - 1))
    return _without_tail(out, offsets)


def transposed_products(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[R, O] x [E, O, I] -> [R, I]: the gradient of the rows."""
    return _without_tail(grouped_mm(_aligned(grad), _aligned(weight), offs=_ends(offsets)), offsets)


def outer(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """[R, O] x [R, I] -> [E, O, I]: the gradient of the weights, exact zeros for experts without rows."""
    return grouped_mm(_aligned(grad).t(), _aligned(rows), offs=_ends(offsets))


def columns(grad: Tensor, offsets: Tensor) -> Tensor:
    """[R, O] -> [E, O]: the sums of each expert's rows; off the CPU as a product with ones, summed in fp32."""
    if grad.device.type == "cpu":
        return loop.columns(grad, offsets)
    ones = grad.new_ones(grad.shape[0], _ALIGNMENT // grad.element_size())
    return outer(grad, ones, offsets)[:, :, 0]


def _ends(offsets: Tensor) -> Tensor:
    return offsets[1:].to(torch.int32)


def _aligned(operand: Tensor) -> Tensor:
    """The operand with rows or columns that start at multiples of 16 bytes."""
    strides = operand.stride()
    major = strides[-2] if strides[-1] == 1 else strides[-1] if strides[-2] == 1 else 1
    steps = (major, *strides[:-2])
    good = all(s > 0 and s * operand.element_size() % _ALIGNMENT == 0 for s in steps)
    if good and operand.data_ptr() % _ALIGNMENT == 0:
        return operand
    return operand.clone(memory_format=torch.contiguous_format)


def _without_tail(out: Tensor, offsets: Tensor) -> Tensor:
    if out.device.type == "cpu":  # where looking is free
        out[int(offsets[-1]) :].zero_()
        return out
    return out.masked_fill_((torch.arange(out.shape[0], device=out.device) >= offsets[-1])[:, None], 0)
