"""Root-mean-square norm."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.params import ParamInfo
from ..ops.few import rms_norm
from .config import RMSNorm as RMSNormConfig

__all__ = ["RMSNorm", "plain"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32 (fp64 for fp64), in the dtype of x at the end.

    Shapes: x [..., D] -> [..., D]. Source: Zhang and Sennrich 2019, eq. 4.
    """

    role = "norm"

    def __init__(self, config: RMSNormConfig, dim: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]  # as self.weight, in a quarter of its time
        made = rms_norm(x, weight, self.eps)
        if made is not None:
            return made
        if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, weight.shape, weight, self.eps)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), self.eps).to(x.dtype)

    def param_info(self) -> dict[str, ParamInfo]:
        return {"weight": ParamInfo(role="norm", decay=False, ones=True)}


def plain(norm: nn.Module | None) -> TypeGuard[RMSNorm]:
    """Whether it is the norm above and nobody watches its calls: then whoever has its weight may do its work."""
    return type(norm) is RMSNorm and not norm._forward_hooks and not norm._forward_pre_hooks
