"""Plans that a caller asks for in place of the router's: every expert, equally, or one and the same everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.plan import Dense, Plan
from ..core.signals import Signals

__all__ = ["asked"]


def asked(wanted: Any, num_experts: int, seen: Tensor, signals: Signals) -> Dense | Plan:
    """The plan of the call-time knob `experts`, with any router: `Signals(knobs={"experts": wanted})`.

    "all": every unit meets every expert, y = mean of f_e(x) (the ensemble of THOR, arXiv 2110.04260; it costs E experts
    per unit). A number e: every unit meets expert e alone with weight 1, in every layer (`expert_num` of its code).
    The router is not asked: such a plan has no probabilities, and no gradient reaches the router.

    Shapes: seen [T, D], of which only the number, dtype and device count. Raises `UserError` for anything else.
    """
    T, valid = seen.shape[0], signals.valid
    dtype = torch.float64 if seen.dtype == torch.float64 else torch.float32
    if wanted == "all":
        weight = torch.full((T, num_experts), 1 / num_experts, dtype=dtype, device=seen.device)
        weight = weight if valid is None else torch.where(valid[:, None], weight, 0.0)
        return Dense(weight=weight, valid=valid, meta=signals.labels())
    if type(wanted) is not int or not 0 <= wanted < num_experts:
        raise UserError(
            f"the knob experts is {wanted!r}; it must be 'all', or the number of an expert that every layer has, here "
            f"0 to {num_experts - 1}"
        )
    expert = torch.full((T, 1), wanted, dtype=torch.int64, device=seen.device)
    weight = torch.ones(T, 1, dtype=dtype, device=seen.device)
    if valid is not None:
        expert, weight = torch.where(valid[:, None], expert, -1), torch.where(valid[:, None], weight, 0.0)
    return Plan(
        expert=expert,
        weight=weight,
        num_experts=num_experts,
        valid=valid,
        meta=signals.labels(),
        complete=valid is None,
    )
