"""Linear maps of one input, in one reading of their weights where few rows meet them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.signals import Signals
from ..ops.few import linears

__all__ = ["products"]


def products(x: Tensor, *maps: nn.Module, signals: Signals | None = None) -> tuple[Tensor, ...]:
    """The maps of x, as their calls would return them. Adapted, wrapped and watched modules are called.

    Shapes: x [..., I] -> [..., O_i] each. Maps with `takes_signals` (adapters that route or drop) are given `signals`.
    """
    weights: list[Any] = []
    biases: list[Any] = []
    for m in maps:
        if type(m) is not nn.Linear or m._forward_hooks or m._forward_pre_hooks:
            break
        own = m._parameters  # as m.weight and m.bias, for a quarter of the time
        weights.append(own["weight"])
        biases.append(own["bias"])
    else:
        made = linears(x, weights, biases)
        if made is not None:
            return made
    return tuple([m(x, signals) if getattr(m, "takes_signals", False) else m(x) for m in maps])
