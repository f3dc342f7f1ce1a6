"""The bank of plain MLP experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.params import ParamInfo
from ..core.plan import AnyPlan
from ..core.rows import Rows
from ..ops.combine import table_weight
from ..ops.expert_mlp import mlp, mlp_mixture
from ..ops.rows import rows as derive_rows
from .bank import Bank, matrices, scaled, uniform_
from .config import MLP

__all__ = ["MLPBank"]


class MLPBank(Bank):
    """down(act(up(x) + up_bias)) + down_bias per expert (Switch Transformer, GShard).

    Shapes: rows [R, D] -> [R, D]; up [E, F, D], down [E, D, F], up_bias [E, F], down_bias [E, D] (the biases only
    with `bias=True`).

    `weights` may hold any of these names. `index.weight`, where given, multiplies the rows that come out.
    """

    def __init__(self, config: MLP, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        F = config.width
        self.up = matrices(num_experts, F, dim)
        self.down = matrices(num_experts, dim, F)
        self.up_bias = nn.Parameter(torch.empty(num_experts, F)) if config.bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, dim)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values as those of `nn.Linear`, per expert."""
        uniform_(self.up, self.dim)
        uniform_(self.down, self.config.width)
        if self.up_bias is not None and self.down_bias is not None:
            uniform_(self.up_bias, self.dim)
            uniform_(self.down_bias, self.config.width)
        if self.config.alike:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.copy_(parameter[:1].clone())

    def forward(
        self, rows: Tensor, index: Rows, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        p = self.values(weights)
        biases = p.get("up_bias"), p.get("down_bias")
        out = mlp(rows, p["up"], p["down"], index.offsets, self.config.activation, *biases, **self._modes())
        return scaled(out, index)

    def mixture(
        self, units: Tensor, plan: AnyPlan, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """y [T, D] of units [T, D] under a plan, as one operation."""
        p, index = self.values(weights), derive_rows(plan)
        biases = p.get("up_bias"), p.get("down_bias")
        weight, activation = table_weight(plan, index), self.config.activation
        return mlp_mixture(units, weight, index, p["up"], p["down"], activation, *biases, **self._modes())

    def per_row(self) -> tuple[int, int]:
        return sum(p.numel() for p in self.parameters()), 2 * (self.up.numel() + self.down.numel())

    def param_info(self) -> dict[str, ParamInfo]:
        matrix = ParamInfo(role=self.role, expert_axis=0, matrix_axes=(1, 2), alike=self.config.alike)
        info = {"up": matrix, "down": matrix}
        if self.config.bias:
            bias = ParamInfo(role=self.role, expert_axis=0, decay=False, init_std=0.0)
            info |= {"up_bias": bias, "down_bias": bias}
        return info
