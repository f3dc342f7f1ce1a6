"""Linear maps of one input, in one reading of their weights where few rows meet them."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.few import linears

__all__ = ["products"]


def products(x: Tensor, *maps: nn.Module) -> tuple[Tensor, ...]:
    """The maps of x, as their calls would return them. Adapted, wrapped and watched modules are called.

    Shapes: x [..., I] -> [..., O_i] each.
    """
    plain = [m for m in maps if type(m) is nn.Linear and not m._forward_hooks and not m._forward_pre_hooks]
    if len(plain) == len(maps):
        tables = [m._parameters for m in plain]  # as m.weight, m.bias, for a quarter of the time
        made = linears(x, tuple([t["weight"] for t in tables]), tuple([t["bias"] for t in tables]))  # type: ignore[misc]
        if made is not None:
            return made
    return tuple([m(x) for m in maps])
