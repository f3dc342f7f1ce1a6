"""Parameters that met no row still take part in the backward pass, with a gradient of zeros."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["touch"]


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(torch.zeros_like(p) for p in ctx.saved_tensors)


def touch(out: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """`out` unchanged; in the backward pass every one of `parameters` receives zeros instead of nothing.

    A parameter whose gradient is missing on one rank hangs or shifts the gradient reduction of the others.
    """
    wanted = [p for p in parameters if p.requires_grad]
    if not wanted or not torch.is_grad_enabled():
        return out
    return _Touch.apply(out, *wanted)  # type: ignore[return-value]
