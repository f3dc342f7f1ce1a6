"""What all banks have in common: substituted weights, initial values, and what a unit that meets some of them costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.account import Cost
from ..core.errors import UserError, did_you_mean
from ..core.params import Role
from ..core.plan import AnyPlan
from ..core.rows import Rows
from ..ops.combine import through
from ..ops.pages import large_pages

__all__ = ["Bank", "matrices"]


class Bank(nn.Module):
    """Base of banks of experts. A bank follows `core.protocols.Experts`.

    role: what its parameters are described as, "expert" or "shared_expert".
    met: how many of its experts a unit meets on average; the layer around it says so, accounting reads it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class that changes `forward` alone does not inherit a `mixture` that knows nothing of the change."""
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__ and "mixture" not in cls.__dict__:
            cls.mixture = Bank.mixture

    config: Any

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.dim = dim
        self.num_experts = num_experts
        self.role: Role = "expert"
        self.met: float = num_experts

    def values(self, weights: Mapping[str, Tensor] | None) -> Mapping[str, Any]:
        """The bank's direct parameters by name (None = it has none), those in `weights` in place of its own."""
        if weights is None:
            return self._parameters
        own: dict[str, Any] = {n: p for n, p in self._parameters.items() if p is not None}
        for name in weights:
            if name not in own:
                raise UserError(f"weights: the bank has no parameter {name!r}{did_you_mean(name, own)}")
        return own | dict(weights)

    def _modes(self) -> dict[str, Any]:
        """The config's promises, as the ops of expert MLPs take them."""
        return {"deterministic": self.config.deterministic, "sparse_grad": self.config.sparse_grad}

    def per_row(self) -> tuple[int, int]:
        """Parameters of all experts, and forward FLOPs of a unit that would meet all of them."""
        parameters = sum(p.numel() for p in self.parameters())
        return parameters, sum(2 * p.numel() for p in self.parameters() if p.ndim > 1)

    def cost(self, seq_len: int = 1) -> Cost:
        """Parameters, active ones and forward FLOPs per unit, at `met` experts per unit."""
        parameters, flops = self.per_row()
        share = self.met / self.num_experts
        return Cost(parameters, round(parameters * share), round(flops * share))

    def forward(
        self, rows: Tensor, index: Rows, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        raise NotImplementedError

    def mixture(
        self, units: Tensor, plan: AnyPlan, context: Any = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """y [T, *unit'] of units [T, *unit] under a plan: gather, `forward` and combine."""
        return through(self, units, plan, context, None if weights is None else dict(weights))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}"


def matrices(*shape: int) -> nn.Parameter:
    """A stack of matrices, not yet written to; in large pages on the CPU, where experts are read in any order."""
    return nn.Parameter(large_pages(torch.empty(*shape), fresh=True))


def uniform_(parameter: Tensor, fan_in: int) -> None:
    """The initial values of `nn.Linear`: uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    with torch.no_grad():
        parameter.uniform_(-bound, bound)


def scaled(out: Tensor, index: Rows) -> Tensor:
    """Rows times `index.weight`, where the index has one (the caller then combines with weights of 1)."""
    if index.weight is None:
        return out
    return out * index.weight.view(-1, *[1] * (out.ndim - 1)).to(out.dtype)
