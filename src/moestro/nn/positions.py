"""Positions that are added to embeddings: learned vectors and sinusoids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.params import ParamInfo
from .config import Learned as LearnedConfig
from .config import Sinusoidal as SinusoidalConfig
from .constants import Constants

__all__ = ["Learned", "Sinusoidal"]


def _places(h: Tensor, position: Tensor | None, start: int, context: int) -> Tensor:
    """[B, S] or [S] int64. Raises `UserError` for places beyond the context, where they are known without looking."""
    B, S, _ = h.shape
    if position is not None:
        return position.view(B, S)
    if start + S > context:
        raise UserError(f"{start + S} tokens do not fit the model's context of {context}")
    return torch.arange(start, start + S, device=h.device)


class Learned(nn.Module):
    """`(h [B, S, D], position [B*S] or None, start) -> h + table[position]`; without positions start, start + 1, ...

    Parameter: table [context, D]. Source: Gehring et al. 2017; BERT.
    """

    role = "embedding"

    def __init__(self, config: LearnedConfig, dim: int, context: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(context, dim))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, h: Tensor, position: Tensor | None = None, start: int = 0) -> Tensor:
        return h + F.embedding(_places(h, position, start, self.table.shape[0]), self.table).to(h.dtype)

    def param_info(self) -> dict[str, ParamInfo]:
        return {"table": ParamInfo(role="embedding", matrix_axes=(0, 1), decay=False)}


class Sinusoidal(Constants):
    """`(h [B, S, D], position [B*S] or None, start) -> h + waves(first + position)`: sines in the first half of the
    width, cosines in the second; frequency base ** (-i / (D/2)), with `endpoint` base ** (-i / (D/2 - 1)).

    Source: Vaswani et al. 2017, section 3.5 (which alternates them).
    """

    frequency: Tensor

    def __init__(self, config: SinusoidalConfig, dim: int, context: int) -> None:
        super().__init__()
        if dim % 2 or dim < (4 if config.endpoint else 2):
            raise UserError(f"Sinusoidal: the model's width must be even, with endpoint at least 4; found {dim}")
        self.config, self.dim, self.context = config, dim, context
        self.make_constants()

    def compute(self) -> dict[str, Tensor]:
        half = self.dim // 2
        pair = torch.arange(half, dtype=torch.float64)
        return {"frequency": self.config.base ** (-pair / (half - self.config.endpoint))}

    def forward(self, h: Tensor, position: Tensor | None = None, start: int = 0) -> Tensor:
        place = _places(h, position, start, self.context) + self.config.first
        angle = place.to(self.frequency.dtype)[..., None] * self.frequency
        return h + torch.cat((angle.sin(), angle.cos()), dim=-1).to(h.dtype)
