"""Expert MLPs row by row, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["activate", "gated_mlp", "mlp"]

_GELU_C = math.sqrt(2 / math.pi)
_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(_GELU_C * (x + 0.044715 * x**3))),
    "relu": lambda x: torch.where(x > 0, x, 0 * x),
    "relu2": lambda x: torch.where(x > 0, x * x, 0 * x),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
}


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation by its formula."""
    return _FORMULAS[activation](x)


def gated_mlp(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    activation: str = "silu",
    widths: tuple[int, ...] | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """[R, D] float64: down(act(gate(x)) * up(x)) with the parameters of each row's expert. clamp: (alpha, limit)."""
    if widths is None:
        ups, downs = list(gate_up.double().unbind(0)), list(down.double().unbind(0))
    else:
        ups = list(gate_up.double().split([2 * f for f in widths]))
        downs = [d.T for d in down.double().split(list(widths))]
    bounds = offsets.tolist()
    out: list[Tensor] = []
    for e in range(len(bounds) - 1):
        for r in range(bounds[e], bounds[e + 1]):
            both = ups[e] @ rows[r].double()
            gate, up = (both if gate_up_bias is None else both + gate_up_bias.double().unbind(0)[e]).chunk(2)
            if clamp is None:
                h = activate(gate, activation) * up
            else:
                alpha, limit = clamp
                gate, up = torch.where(gate > limit, limit, gate), torch.where(up.abs() > limit, up.sign() * limit, up)
                h = gate / (1 + torch.exp(-alpha * gate)) * (up + 1)
            y = downs[e] @ h
            out.append(y if down_bias is None else y + down_bias.double().unbind(0)[e])
    return torch.stack(out) if out else rows.double()[:0]


def mlp(
    rows: Tensor,
    up: Tensor,
    down: Tensor,
    offsets: Tensor,
    activation: str = "gelu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """[R, D] float64: down(act(up(x) + up_bias)) + down_bias with the parameters of each row's expert."""
    ups, downs = up.double().unbind(0), down.double().unbind(0)
    first = None if up_bias is None else up_bias.double().unbind(0)
    second = None if down_bias is None else down_bias.double().unbind(0)
    bounds = offsets.tolist()
    out: list[Tensor] = []
    for e in range(len(bounds) - 1):
        for r in range(bounds[e], bounds[e + 1]):
            h = ups[e] @ rows[r].double()
            h = activate(h if first is None else h + first[e], activation)
            y = downs[e] @ h
            out.append(y if second is None else y + second[e])
    return torch.stack(out) if out else rows.double()[:0]
