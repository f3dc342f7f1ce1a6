"""Which dtype an operation computes in: autocast for products, at least fp32 for sums."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_off", "autocast_to", "sum_dtype"]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of `dtype` are taken in: float64 for float64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_to(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast wants the operands of a product; unchanged without autocast, and float64 always.

    The casts are differentiable, so gradients come back in the dtype of the parameters.
    """
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which products keep the dtype of their operands."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
