"""Failure 4: banks whose idle experts get no gradient, or another expert's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.params import ParamInfo
from moestro.core.rows import Rows


class Naive(nn.Module):
    """A list of linear experts run one after the other; idle ones are skipped, so their gradient is None."""

    def __init__(self, num_experts: int = 4, dim: int = 16) -> None:
        super().__init__()
        self.experts = nn.ParameterList([nn.Parameter(torch.randn(dim, dim) * 0.2) for _ in range(num_experts)])
        self.role = "expert"

    def matrices(self, weights: dict[str, Tensor] | None) -> list[Tensor]:
        if weights is None:
            return list(self.experts)
        return [weights[f"experts.{e}"] for e in range(len(self.experts))]

    def forward(self, rows: Tensor, index: Rows, context=None, weights=None) -> Tensor:
        bounds = index.offsets.tolist()
        out = [rows[a:b] @ w for a, b, w in zip(bounds, bounds[1:], self.matrices(weights)) if b > a]
        return torch.cat(out) if out else rows * 0 + 0 * self.matrices(weights)[0].sum()


class Stacked(nn.Module):
    """A stacked bank."""

    role = "expert"

    def __init__(self, num_experts: int = 4, dim: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, dim, dim) * 0.2)

    def param_info(self) -> dict[str, ParamInfo]:
        return {"weight": ParamInfo(role="expert", expert_axis=0, matrix_axes=(1, 2))}

    def forward(self, rows: Tensor, index: Rows, context=None, weights=None) -> Tensor:
        weight = self.weight if weights is None else weights["weight"]
        matrices = weight.unbind(0)
        parts = rows.split((index.offsets[1:] - index.offsets[:-1]).tolist())
        return torch.cat([p @ m for p, m in zip(parts, matrices)])


class TakesAnothers(Stacked):
    """Gradients are handed out by who had rows: with an idle expert, everybody behind it gets another's."""

    def forward(self, rows: Tensor, index: Rows, context=None, weights=None) -> Tensor:
        weight = self.weight if weights is None else weights["weight"]
        matrices = weight.unbind(0)
        parts = rows.split((index.offsets[1:] - index.offsets[:-1]).tolist())
        busy = [e for e, part in enumerate(parts) if len(part)]
        seat = {e: i for i, e in enumerate(busy)}
        out = rows * 0 + 0 * weight.sum()
        for e, part in enumerate(parts):
            taken = matrices[seat.get(e, 0)]
            value = part @ (taken + (matrices[e] - taken).detach())
            start = int(index.offsets[e])
            out = torch.cat([out[:start], value, out[start + len(part) :]])
        return out
