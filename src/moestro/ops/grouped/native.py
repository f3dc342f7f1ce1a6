"""The grouped product in compiled C on the CPU, fp32: matrices are read as they lie, in either order."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..pages import large_pages
from . import loop
from .spec import Spec

__all__ = ["columns", "outer", "products", "supported", "transposed_products"]

NAME = "native"


def supported(spec: Spec) -> tuple[bool, str]:
    """Whether this backend takes such operands, and why (not)."""
    if spec.device != "cpu":
        return False, f"runs on the CPU, not on {spec.device}"
    if spec.dtype != torch.float32:
        return False, f"has fp32 only, not {spec.dtype_name}"
    if spec.compiling:
        return False, "cannot be traced"
    if min(spec.rows, spec.inputs, spec.outputs, spec.experts) == 0:
        return False, "there is nothing to compute"
    return native.load() is not None, native.reason()


def products(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """[R, I] x [E, O, I] -> [R, O]. Rows after the last offset come out as zeros."""
    return _PRODUCTS(rows, weight, offsets, bias)


def transposed_products(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[R, O] x [E, O, I] -> [R, I]: the gradient of the rows."""
    return _PRODUCTS(grad, weight.transpose(1, 2), offsets, None)


def outer(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """[R, O] x [R, I] -> [E, O, I]: the gradient of the weights, exact zeros for experts without rows."""
    return _OUTER(grad, rows, offsets)


def columns(grad: Tensor, offsets: Tensor) -> Tensor:
    """[R, O] -> [E, O]: the sums of each expert's rows, zeros for experts without rows."""
    return loop.columns(grad, offsets)


# As operations of torch's, so that whoever watches them (FLOP counters, profilers) sees them -------------------------


def _products(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    (E, O, I), turned = weight.shape, not weight.transpose(1, 2).is_contiguous()
    rows, stack = rows.contiguous(), weight.contiguous() if turned else weight
    bias, offsets = None if bias is None else bias.contiguous(), offsets.contiguous()
    out = rows.new_empty(rows.shape[0], O)
    library, room = _room(rows, E, I, O)
    pointers = (out.data_ptr(), rows.data_ptr(), stack.data_ptr(), turned, None if bias is None else bias.data_ptr())
    library.moestro_grouped(*pointers, offsets.data_ptr(), E, I, O, *room.arguments)
    out[int(offsets[-1]) :].zero_()
    return out


def _outer(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    grad, rows, offsets = grad.contiguous(), rows.contiguous(), offsets.contiguous()
    E, O, I = offsets.shape[0] - 1, grad.shape[1], rows.shape[1]
    out = large_pages(rows.new_empty(E, O, I), fresh=True)
    library, room = _room(rows, E, O, I)
    pointers = (out.data_ptr(), grad.data_ptr(), rows.data_ptr(), offsets.data_ptr())
    library.moestro_grouped_outer(*pointers, E, O, I, *room.arguments)
    return out


class _Room:
    """Memory that a call works in."""

    def __init__(self, like: Tensor, floats: int, numbers: int) -> None:
        threads = torch.get_num_threads()
        self.scratch = like.new_empty(threads * floats)
        self.tasks = like.new_empty(numbers, dtype=torch.int64)
        self.arguments = (self.scratch.data_ptr(), floats, self.tasks.data_ptr(), threads)


def _room(rows: Tensor, experts: int, inputs: int, outputs: int) -> tuple[Any, _Room]:
    library = native.load()
    assert library is not None
    sizes = (ctypes.c_int64 * 2)()
    library.moestro_grouped_sizes(rows.shape[0], experts, inputs, outputs, ctypes.addressof(sizes))
    return library, _Room(rows, *sizes)


_LIBRARY = torch.library.Library("moestro", "FRAGMENT")
_LIBRARY.define("grouped_products(Tensor rows, Tensor weight, Tensor offsets, Tensor? bias) -> Tensor")
_LIBRARY.define("grouped_outer(Tensor grad, Tensor rows, Tensor offsets) -> Tensor")
_LIBRARY.impl("grouped_products", _products, "CPU")
_LIBRARY.impl("grouped_outer", _outer, "CPU")
_PRODUCTS = torch.ops.moestro.grouped_products.default
_OUTER = torch.ops.moestro.grouped_outer.default


@torch.library.register_fake("moestro::grouped_products")
def _(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.register_fake("moestro::grouped_outer")
def _(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(offsets.shape[0] - 1, grad.shape[1], rows.shape[1])
