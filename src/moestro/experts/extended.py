"""The bank of plain MLP experts with a multiplicative branch that starts at one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.params import ParamInfo
from ..core.plan import AnyPlan
from ..core.rows import Rows
from ..ops.combine import table_weight
from ..ops.expert_mlp import gated_mixture, gated_mlp
from ..ops.rows import rows as derive_rows
from .bank import Bank, matrices, scaled, uniform_
from .config import GatedExtension

__all__ = ["ExtendedBank"]


class ExtendedBank(Bank):
    """down(act(up x + up_bias) * (new x + new_bias)) + down_bias per expert. At the start new = 0 and new_bias = 1, and
    it is `MLPBank`. Source: 34 (arXiv 2401.15713), first version: W_down(GELU(W_up x) * (W_new x + b_new)).

    Shapes: rows [R, D] -> [R, D]; up, new [E, F, D]; new_bias [E, F]; down [E, D, F]; up_bias [E, F], down_bias [E, D]
    (these two only with `bias=True`). To the ops it is a gated bank with biases, its two branches laid side by side for
    the call; `ops.expert_mlp.explain` says which backends can compute that.

    `weights` may hold any of these names. `index.weight`, where given, multiplies the rows that come out.
    """

    def __init__(self, config: GatedExtension, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        F = config.width
        self.up = matrices(num_experts, F, dim)
        self.new = matrices(num_experts, F, dim)
        self.new_bias = nn.Parameter(torch.empty(num_experts, F))
        self.down = matrices(num_experts, dim, F)
        self.up_bias = nn.Parameter(torch.empty(num_experts, F)) if config.bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, dim)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Those of the plain experts as of `nn.Linear`; the branch as one."""
        for value, inputs in (
            (self.up, self.dim),
            (self.up_bias, self.dim),
            (self.down, self.config.width),
            (self.down_bias, self.config.width),
        ):
            if value is not None:
                uniform_(value, inputs)
        nn.init.zeros_(self.new)
        nn.init.ones_(self.new_bias)

    def forward(
        self, rows: Tensor, index: Rows, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        first, down, more = self._as_gated(weights)
        return scaled(gated_mlp(rows, first, down, index.offsets, self.config.activation, **more), index)

    def mixture(
        self, units: Tensor, plan: AnyPlan, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """y [T, D] of units [T, D] under a plan, as one operation."""
        index = derive_rows(plan)
        first, down, more = self._as_gated(weights)
        return gated_mixture(units, table_weight(plan, index), index, first, down, self.config.activation, **more)

    def _as_gated(self, weights: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
        p = self.values(weights)
        up_bias = p.get("up_bias")
        up_bias = torch.zeros_like(p["new_bias"]) if up_bias is None else up_bias
        biases = {"gate_up_bias": torch.cat((up_bias, p["new_bias"]), 1), "down_bias": p.get("down_bias")}
        return torch.cat((p["up"], p["new"]), 1), p["down"], biases

    def per_row(self) -> tuple[int, int]:
        matrix = self.up.numel() + self.new.numel() + self.down.numel()
        return sum(p.numel() for p in self.parameters()), 2 * matrix

    def param_info(self) -> dict[str, ParamInfo]:
        matrix = ParamInfo(role=self.role, expert_axis=0, matrix_axes=(1, 2))
        info = {
            "up": matrix,
            "new": ParamInfo(role=self.role, expert_axis=0, matrix_axes=(1, 2), init_std=0.0),
            "new_bias": ParamInfo(role=self.role, expert_axis=0, decay=False, ones=True),
            "down": matrix,
        }
        if self.config.bias:
            bias = ParamInfo(role=self.role, expert_axis=0, decay=False, init_std=0.0)
            info |= {"up_bias": bias, "down_bias": bias}
        return info
