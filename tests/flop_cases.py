"""torch's FlopCounterMode, completed: what counted FLOPs are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def counter() -> FlopCounterMode:
    """torch counts every attention kernel but the CPU's flash one; that gets the formula of the others.

    Grouped heads are counted as their queries' heads, as the formula of the plain path does.
    """

    def spread(q: Any, *kv: Any) -> list[tuple[int, ...]]:
        return [(t[0], q[1], *t[2:]) for t in kv]

    def forward(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(q, *spread(q, k, v))

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, q, *spread(q, k, v))

    ops = torch.ops.aten
    mapping = {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)
