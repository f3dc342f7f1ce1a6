"""FLOPs of the grouped product for `torch.utils.flop_counter.FlopCounterMode`, which does not know it by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import native as _native  # defines two of the operations

__all__ = ["grouped_mm_flops"]


def grouped_mm_flops(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two per multiply-add. a, b: shapes, [R, I] x [E, I, O] or [O, R] x [R, I]; every row belongs to one group."""
    if len(a) == 2:
        return 2 * a[0] * a[1] * b[-1]
    return 2 * a[-2] * a[-1] * b[-1] * (1 if len(b) == 2 else a[0])


@register_flop_formula(torch.ops.moestro.grouped_products)
def _(rows: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.moestro.grouped_outer)
def _(grad: Any, rows: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * grad[0] * grad[1] * rows[1]


if torch.ops.aten._grouped_mm not in flop_registry:  # later versions may bring their own
    register_flop_formula(torch.ops.aten._grouped_mm)(grouped_mm_flops)

del _native
