"""Which dtype an operation computes in: autocast for products, at least fp32 for sums."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError

__all__ = ["autocast_off", "operands", "sum_dtype"]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of `dtype` are taken in: float64 for float64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operands(what: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The operands of a product in one dtype: as autocast wants them, or as they are; float64 always as it is.

    The casts are differentiable, so gradients come back in the dtype of the parameters. Raises `UserError` in the name
    of `what` if the dtypes differ and autocast does not settle it.
    """
    given = [t for t in tensors if t is not None]
    device = given[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise UserError(f"{what}: operands are {names}; cast them to one dtype or run under torch.autocast")
    return tensors


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which products keep the dtype of their operands."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
