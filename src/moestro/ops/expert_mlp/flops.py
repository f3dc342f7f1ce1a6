"""FLOPs of routed experts for `torch.utils.flop_counter.FlopCounterMode`: the products, two per multiply-add."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from . import few, op

__all__ = ["backward_flops", "few_flops", "forward_flops"]


def _multiplications(x: Tensor, down: Tensor, offsets: Tensor, unit: Any, widths: Any) -> int:
    """Multiply-adds of one [F, D] matrix per row, over all rows.

    Where widths differ this needs the offsets; on fake tensors, that have none, every expert counts the mean width.
    """
    R, D = (x if unit is None else unit).shape[0], x.shape[1]
    if widths is None:
        return R * D * down.shape[2]
    if isinstance(offsets, FakeTensor) or offsets.device.type == "meta":
        return R * D * sum(widths) // max(1, len(widths))
    return sum((b - a) * D * f for (a, b), f in zip(itertools.pairwise(offsets.tolist()), widths))


@register_flop_formula(op.FORWARD.overloadpacket, get_raw=True)
def forward_flops(
    x: Tensor,
    first: Tensor,
    down: Tensor,
    offsets: Tensor,
    activation: str,
    gated: bool,
    unit: Tensor | None = None,
    slot: Tensor | None = None,
    inverse: Tensor | None = None,
    weight: Tensor | None = None,
    first_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    widths: list[int] | None = None,
    deterministic: bool = False,
    clamp: list[float] | None = None,
    save: bool = False,
    sparse_grad: bool = False,
    out_val: Any = None,
) -> int:
    """Three (gated) or two matrices per row."""
    return 2 * (3 if gated else 2) * _multiplications(x, down, offsets, unit, widths)


@register_flop_formula([op.BACKWARD.overloadpacket, op.TOUCHED.overloadpacket], get_raw=True)
def backward_flops(
    grad: Tensor,
    hidden: Tensor,
    x: Tensor,
    first: Tensor,
    down: Tensor,
    offsets: Tensor,
    *rest: Any,
    out_val: Any = None,
) -> int:
    """Twice the forward pass where everything is wanted: each matrix once for its input, once for itself."""
    gated, unit, widths, wanted = rest[1], rest[2], rest[8], rest[-1]
    x_wanted, _, first_wanted, down_wanted = wanted[:4]
    tall = 2 if gated else 1
    products = 1 + tall * (bool(x_wanted) + bool(first_wanted)) + bool(down_wanted)
    return 2 * products * _multiplications(x, down, offsets, unit, widths)


@register_flop_formula(few.FORWARD.overloadpacket)
def few_flops(x: Any, expert: Any, weight: Any, gate_up: Any, down: Any, *args: Any, out_shape: Any = None) -> int:
    """Three matrices per choice, as if every choice were of a real expert."""
    return 2 * 3 * expert[0] * expert[1] * down[1] * down[2]
