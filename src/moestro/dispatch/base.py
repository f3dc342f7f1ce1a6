"""From units to their mixture, by whatever way the experts or the exchange around them offer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.plan import AnyPlan
from ..ops.combine import through

__all__ = ["mixture"]


def mixture(
    experts: Any, units: Tensor, plan: AnyPlan, context: Any = None, weights: dict[str, Tensor] | None = None
) -> Tensor:
    """y [T, *unit'] of units [T, *unit] under a plan: by `experts.mixture`, where there is one, else through rows.

    A module whose call was changed from outside (hooks of sharding, offloading or a profiler, a replaced `forward`) is
    called as it wants to be called: with rows.
    """
    own = getattr(experts, "mixture", None)
    if own is None or _changed(experts):
        return through(experts, units, plan, context, weights)
    return own(units, plan, context, weights)


def _changed(experts: Any) -> bool:
    if not isinstance(experts, nn.Module):
        return False
    hooks = (experts._forward_hooks, experts._forward_pre_hooks, experts._backward_hooks, experts._backward_pre_hooks)
    return any(len(h) > 0 for h in hooks) or "forward" in experts.__dict__
