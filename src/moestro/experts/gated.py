"""The bank of gated MLP experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.params import ParamInfo
from ..core.plan import AnyPlan, Plan
from ..core.rows import Rows
from ..ops.combine import table_weight
from ..ops.expert_mlp import FEW, gated_few, gated_mixture, gated_mlp
from ..ops.rows import rows as derive_rows
from .bank import Bank, matrices, scaled, uniform_
from .config import Gated

__all__ = ["GatedBank"]


class GatedBank(Bank):
    """down(act(gate(x)) * up(x)) per expert, no bias (SwiGLU with silu; Shazeer 2020).

    Shapes: rows [R, D] -> [R, D]. Equal widths: gate_up [E, 2F, D] (gate rows first), down [E, D, F].
    Unequal widths F_e: the experts' blocks one after the other, gate_up [sum 2F_e, D] and down, transposed,
    [sum F_e, D]; expert e then costs what its width costs.

    `weights` may hold "gate_up" and "down". `index.weight`, where given, multiplies the rows that come out.
    Raises `UserError` where the tuple of widths does not have one entry per expert.
    """

    def __init__(self, config: Gated, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)
        self.config = config
        self.widths: tuple[int, ...] | None = None
        if isinstance(config.width, tuple):
            if len(config.width) != num_experts:
                raise UserError(
                    f"Gated.width: {len(config.width)} widths for {num_experts} experts; "
                    "give one width, or one per expert"
                )
            self.widths = config.width
            total = sum(self.widths)
            self.gate_up = matrices(2 * total, dim)
            self.down = matrices(total, dim)
        else:
            self.gate_up = matrices(num_experts, 2 * config.width, dim)
            self.down = matrices(num_experts, dim, config.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values as those of `nn.Linear`, per expert."""
        uniform_(self.gate_up, self.dim)
        if self.widths is None:
            uniform_(self.down, self.down.shape[2])
        else:
            for block, width in zip(self.down.detach().split(list(self.widths)), self.widths):
                uniform_(block, width)

    def forward(
        self, rows: Tensor, index: Rows, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        p, modes = self.values(weights), self._modes()
        out = gated_mlp(rows, p["gate_up"], p["down"], index.offsets, self.config.activation, self.widths, **modes)
        return scaled(out, index)

    def mixture(
        self, units: Tensor, plan: AnyPlan, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """y [T, D] of units [T, D] under a plan, as one operation; without sorting where there are few choices."""
        p, config = self.values(weights), self.config
        gate_up, down = p["gate_up"], p["down"]
        if isinstance(plan, Plan) and self._few(plan, units, gate_up, down):
            real = plan.kept is None and plan.valid is None
            expert = plan.expert if real else torch.where(plan.routed(), plan.expert, -1)
            return gated_few(units, expert, plan.weight, gate_up, down, config.activation)
        index = derive_rows(plan)
        weight = table_weight(plan, index)
        return gated_mixture(units, weight, index, gate_up, down, config.activation, self.widths, **self._modes())

    def _few(self, plan: Plan, *tensors: Tensor) -> bool:
        """Whether the path that reads the table serves: few choices, no gradient, nothing it cannot promise."""
        if self.widths is not None or self.config.deterministic or plan.expert.numel() > FEW:
            return False
        return not torch.is_grad_enabled() or not any(t.requires_grad for t in (plan.weight, *tensors))

    def param_info(self) -> dict[str, ParamInfo]:
        """Blocks of unequal widths count no experts along an axis and are not one matrix: they declare neither."""
        if self.widths is not None:
            return {"gate_up": ParamInfo(role=self.role), "down": ParamInfo(role=self.role)}
        return {
            "gate_up": ParamInfo(role=self.role, expert_axis=0, matrix_axes=(1, 2), parts=("gate", "up")),
            "down": ParamInfo(role=self.role, expert_axis=0, matrix_axes=(1, 2)),
        }
