"""The bank of gated experts with a clamped unit and biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.params import ParamInfo
from ..core.plan import AnyPlan
from ..core.rows import Rows
from ..ops.combine import table_weight
from ..ops.expert_mlp import Clamp, gated_mixture, gated_mlp
from ..ops.rows import rows as derive_rows
from .bank import Bank, matrices, scaled, uniform_
from .config import ClampedGated

__all__ = ["ClampedGatedBank"]


class ClampedGatedBank(Bank):
    """down(g sigmoid(alpha g) (u + 1)) + down_bias per expert, with g = min(gate(x), limit), u = up(x) clamped to
    +-limit, gate and up with biases (GPT-OSS; Agarwal et al. 2025, arXiv 2508.10925, section 2.3).

    Shapes: rows [R, D] -> [R, D]; gate_up [E, 2F, D] (gate rows first), down [E, D, F], gate_up_bias [E, 2F], down_bias
    [E, D] (the biases only with `bias=True`).

    `weights` may hold any of these names. `index.weight`, where given, multiplies the rows that come out.
    """

    def __init__(self, config: ClampedGated, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.clamp = Clamp(config.alpha, config.limit)
        F = config.width
        self.gate_up = matrices(num_experts, 2 * F, dim)
        self.down = matrices(num_experts, dim, F)
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, 2 * F)) if config.bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, dim)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values as those of `nn.Linear`, per expert."""
        for value, inputs in (
            (self.gate_up, self.dim),
            (self.down, self.config.width),
            (self.gate_up_bias, self.dim),
            (self.down_bias, self.config.width),
        ):
            if value is not None:
                uniform_(value, inputs)

    def forward(
        self, rows: Tensor, index: Rows, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        p = self.values(weights)
        return scaled(gated_mlp(rows, p["gate_up"], p["down"], index.offsets, **self._options(p)), index)

    def mixture(
        self, units: Tensor, plan: AnyPlan, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """y [T, D] of units [T, D] under a plan, as one operation."""
        p, index = self.values(weights), derive_rows(plan)
        return gated_mixture(units, table_weight(plan, index), index, p["gate_up"], p["down"], **self._options(p))

    def _options(self, p: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "gate_up_bias": p.get("gate_up_bias"),
            "down_bias": p.get("down_bias"),
            "clamp": self.clamp,
            "sparse_grad": self.config.sparse_grad,
        }

    def per_row(self) -> tuple[int, int]:
        return sum(p.numel() for p in self.parameters()), 2 * (self.gate_up.numel() + self.down.numel())

    def param_info(self) -> dict[str, ParamInfo]:
        info = {
            "gate_up": ParamInfo(role=self.role, expert_axis=0, matrix_axes=(1, 2), parts=("gate", "up")),
            "down": ParamInfo(role=self.role, expert_axis=0, matrix_axes=(1, 2)),
        }
        if self.config.bias:
            bias = ParamInfo(role=self.role, expert_axis=0, decay=False, init_std=0.0)
            info |= {"gate_up_bias": bias, "down_bias": bias}
        return info
