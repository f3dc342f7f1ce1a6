"""Gated experts for a few units in compiled C: each weight is read once, at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .activations import ACTIVATIONS

__all__ = ["few", "run"]

_CODES = {name: number for number, name in enumerate(ACTIVATIONS)}  # the order of mathv.h


def few(x: Tensor, expert: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor | None:
    """y [T, D], or None where this is not for the compiled kernels: another dtype or device, or there are none."""
    if not all(t.is_cpu for t in (x, expert, weight, gate_up, down)):
        return None
    if not x.dtype is gate_up.dtype is down.dtype is torch.float32:
        return None
    library = native.load()
    if library is None:
        return None
    x, expert, weight = x.contiguous(), expert.long().contiguous(), weight.float().contiguous()
    return run(library, x, expert, weight, gate_up.contiguous(), down.contiguous(), activation)


def run(
    library: native.Library,
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
) -> Tensor:
    """The call itself, of contiguous tensors on the CPU whose shapes fit; expert is int64, all others are fp32."""
    T, D = x.shape
    E, F = gate_up.shape[0], down.shape[2]
    K = expert.shape[1]
    y = torch.empty_like(x)
    failed = library.moestro_few_f32(
        y.data_ptr(),
        x.data_ptr(),
        expert.data_ptr(),
        weight.data_ptr(),
        gate_up.data_ptr(),
        down.data_ptr(),
        T,
        K,
        E,
        D,
        F,
        _CODES[activation],
        1,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("gated_few: no memory for the hidden values")
    return y
