"""The compiled kernels for packed weights. Each function answers None where they do not apply."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..expert_mlp.activations import ACTIVATIONS
from .format import KINDS, Packed, unpack

__all__ = ["few", "loaded", "product", "unpacked"]

_CODES = {name: number for number, name in enumerate(ACTIVATIONS)}  # the order of mathv.h


def few(
    library: native.Library | None,
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    first: Packed,
    down: Packed,
    activation: str,
    gated: bool,
) -> Tensor | None:
    """`packed_few` in C: every packed byte is read once. Shapes must fit."""
    if library is None or not (_plain(first) and _plain(down) and expert.is_cpu and weight.is_cpu):
        return None
    T, D = x.shape
    x = x.contiguous()
    expert = (expert if expert.dtype is torch.int64 else expert.long()).contiguous()
    weight = (weight if weight.dtype is torch.float32 else weight.float()).contiguous()
    y = torch.empty_like(x)
    failed = library.moestro_packed_few(
        KINDS[first.kind],
        y.data_ptr(),
        x.data_ptr(),
        expert.data_ptr(),
        weight.data_ptr(),
        first.data.data_ptr(),
        None if first.scale is None else first.scale.data_ptr(),
        down.data.data_ptr(),
        None if down.scale is None else down.scale.data_ptr(),
        T,
        expert.shape[1],
        down.data.shape[0],
        D,
        down.inputs,
        _CODES[activation],
        gated,
        torch.get_num_threads(),
    )
    return _done(failed, y)


def product(library: native.Library | None, x: Tensor, weight: Packed) -> Tensor | None:
    """x [.., I] times the transposed weight [O, I], in C."""
    if library is None or not _plain(weight):
        return None
    O, I = weight.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], O)
    failed = library.moestro_packed_product(
        KINDS[weight.kind],
        y.data_ptr(),
        x.data_ptr(),
        weight.data.data_ptr(),
        None if weight.scale is None else weight.scale.data_ptr(),
        x.numel() // max(I, 1),
        O,
        I,
        torch.get_num_threads(),
    )
    return _done(failed, y)


def unpacked(packed: Packed) -> Tensor:
    """`unpack`, in C where that can be: bit by bit the same."""
    library = native.load() if packed.data.is_cpu else None
    if library is None or not _plain(packed):
        return unpack(packed)
    rows = torch.Size(packed.shape[:-1]).numel()
    w = torch.empty(packed.shape)
    failed = library.moestro_unpack(
        KINDS[packed.kind],
        w.data_ptr(),
        packed.data.data_ptr(),
        None if packed.scale is None else packed.scale.data_ptr(),
        rows,
        packed.inputs,
        torch.get_num_threads(),
    )
    return _done(failed, w)


def loaded(x: Tensor) -> native.Library | None:
    """The compiled kernels, if x is theirs."""
    return native.load() if x.is_cpu and x.dtype is torch.float32 else None


def _plain(packed: Packed) -> bool:
    """Whether the kernels find the bytes where the tensor says."""
    scale = packed.scale
    if not (packed.data.is_cpu and packed.data.is_contiguous()):
        return False
    return scale is None or (scale.is_cpu and scale.is_contiguous())


def _done(failed: int, result: Tensor) -> Tensor:
    if failed:
        raise MemoryError("packed weights: no memory for what lies between")
    return result
