"""The gradient norm, computed in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .touched import stored

__all__ = ["clip", "grad_norm"]


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """[] float64: the Euclidean norm of all gradients together.

    Each tensor's norm is taken in fp32 (float64 for float64), their squares are added in float64 in the order given:
    the result does not know how tensors are grouped, and equal gradients give equal norms on every rank. Gradients of
    touched experts only have the norm of the full gradient.
    """
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    dtype = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    each = torch._foreach_norm([stored(g) for g in grads], 2, dtype=dtype)
    return torch.stack(each).double().square().sum().sqrt()


def clip(grads: Sequence[Tensor], norm: float, limit: float) -> float:
    """Scale the gradients in place so that their norm is at most `limit` (0 = never); returns the factor. Sparse ones
    must have been settled (optim/touched.py)."""
    if not limit or norm <= limit or not math.isfinite(norm):
        return 1.0
    factor = limit / norm
    torch._foreach_mul_([stored(g) for g in grads], factor)
    return factor
