"""The root-mean-square norm of few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import FEW, kernels, ready

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """x / sqrt(mean(x^2) + eps) * weight, or None where it does not apply.

    Shapes: x [..., D] of few rows, weight [D] -> [..., D].
    """
    library = kernels(x)
    if library is None:
        return None
    D = x.shape[-1]
    T = x.numel() // D if D else 0
    if T > 16 * FEW or not T or weight.shape != (D,) or not ready(x, weight):
        return None
    y = torch.empty_like(x)
    library.moestro_rms_norm(y.data_ptr(), x.data_ptr(), weight.data_ptr(), T, D, eps)
    return y
