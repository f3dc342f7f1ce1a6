"""Large pages of memory under large tensors on the CPU.

Linux gives memory in pages of 4 KiB unless it is asked for larger ones. Touching 50 MB of fresh memory page by page
costs several times what filling it costs, and reading experts' weights in an order that changes with every token spends
part of its time on looking pages up. Elsewhere, and where the system refuses, nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LARGE", "large_pages"]

LARGE = 2**22
"""Bytes from which large pages are asked for."""

_PAGE = 2**21
_REAL = (Tensor, torch.nn.Parameter)
_HUGEPAGE, _COLLAPSE = 14, 25  # of madvise, from Linux' mman-common.h


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.restype, function.argtypes = ctypes.c_int, (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def large_pages(tensor: Tensor, fresh: bool = False) -> Tensor:
    """The same tensor, its memory in large pages where that can be had and it is at least `LARGE` bytes.

    fresh: nothing has been written to it, so that large pages come by themselves as it is filled.
    """
    if type(tensor) not in _REAL or not tensor.is_cpu or not tensor.is_contiguous() or tensor.nbytes < LARGE:
        return tensor
    madvise = _madvise()
    if madvise is not None:
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        size = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE - start
        if size > 0 and madvise(start, size, _HUGEPAGE) == 0 and not fresh:
            madvise(start, size, _COLLAPSE)
    return tensor
