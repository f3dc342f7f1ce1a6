"""Whether the CPU kernels for few rows may be used."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..native import Library, load

__all__ = ["FEW", "kernels", "ready"]

FEW = 4
"""The most rows for which a product is a matter of reading the weights."""


def kernels(x: Tensor) -> Library | None:
    """The compiled kernels, if x is theirs and nobody wants a gradient, another dtype, a trace or to see operations."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if type(x) is not Tensor or x.dtype is not torch.float32 or not x.is_cpu:
        return None
    if torch.is_autocast_enabled("cpu") or torch._C._len_torch_dispatch_stack():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]  # vmap and its kin
        return None
    return _library()


_library = functools.cache(load)  # without its lock


def ready(*tensors: Tensor | None) -> bool:
    """Whether all are fp32 numbers in the CPU's memory, in order, and no tensors of another kind in disguise."""
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN or t.dtype is not torch.float32 or not t.is_cpu or not t.is_contiguous():
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)
