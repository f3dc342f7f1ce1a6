"""Root-mean-square norm and layer norm."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.params import ParamInfo
from ..ops.few import rms_norm
from .config import LayerNorm as LayerNormConfig
from .config import NoNorm as NoNormConfig
from .config import RMSNorm as RMSNormConfig

__all__ = ["LayerNorm", "NoNorm", "RMSNorm", "plain"]


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


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, in fp32 (fp64 for fp64), in the dtype of x at
    the end; var is the mean squared deviation.

    Shapes: x [..., D] -> [..., D]. Source: Ba et al. 2016, eq. 3-4.
    """

    role = "norm"

    def __init__(self, config: LayerNormConfig, dim: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.weight.shape, self.weight.to(wide), bias, self.eps).to(x.dtype)

    def param_info(self) -> dict[str, ParamInfo]:
        return {
            "weight": ParamInfo(role="norm", decay=False, ones=True),
            "bias": ParamInfo(role="norm", decay=False, init_std=0.0),
        }


class NoNorm(nn.Identity):
    """x as it is."""

    role = "norm"

    def __init__(self, config: NoNormConfig, dim: int) -> None:
        super().__init__()


def plain(norm: nn.Module | None) -> TypeGuard[RMSNorm]:
    """Whether it is the norm above and nobody watches its calls: then whoever has its weight may do its work."""
    return type(norm) is RMSNorm and not norm._forward_hooks and not norm._forward_pre_hooks
