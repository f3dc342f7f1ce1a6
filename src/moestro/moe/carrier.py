"""A loss that rides on another tensor's gradient, for forwards that cannot return it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["ride"]


class _Ride(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.like = loss.detach()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], torch.full_like(ctx.like, ctx.scale), None


def ride(y: Tensor, loss: Tensor | float, scale: float = 1.0) -> Tensor:
    """`y` unchanged; when a gradient reaches it in a backward pass, `loss` receives the gradient `scale`.

    The parameters behind `loss` then get what `(total + scale * loss).backward()` would have given them. A backward
    pass that runs through a recomputed y carries the recomputed loss, once. Shapes: y any, loss [].
    """
    if not (isinstance(loss, Tensor) and loss.requires_grad and torch.is_grad_enabled()):
        return y
    return _Ride.apply(y, loss, scale)  # type: ignore[return-value]
