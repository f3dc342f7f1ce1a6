"""Gated experts for a few units, without a gradient: reads the plan's own table and sorts nothing (`experts_few`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import UserError
from ..few.kernels import kernels, ready
from ..precision import autocast_off, operands, sum_dtype
from .activations import activation_named
from .few_native import few, run
from .shapes import check_few

__all__ = ["FEW", "FORWARD", "gated_few"]

FEW = 16
"""The most choices, T * K, for which the layer takes this path."""

_LIBRARY = torch.library.Library("moestro", "FRAGMENT")
_LIBRARY.define(
    "experts_few(Tensor x, Tensor expert, Tensor weight, Tensor gate_up, Tensor down, str activation) -> Tensor"
)
FORWARD = torch.ops.moestro.experts_few.default


def gated_few(
    x: Tensor, expert: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str = "silu"
) -> Tensor:
    """The weighted sum of each unit's gated experts, from a table of choices; for decoding.

    Shapes: x [T, D], expert [T, K] int64 (ids outside 0..E-1 add nothing), weight [T, K], gate_up [E, 2F, D], down
    [E, D, F] -> [T, D]. Raises `UserError` where a gradient is asked for (it has none) and for shapes that do not fit.
    """
    library = kernels(x)
    if library is not None and ready(x, weight, gate_up, down) and expert.is_cpu and expert.dtype is torch.int64:
        activation_named(activation)  # nobody looks on, and going through the op would cost a tenth of a small layer
        check_few(x, expert, weight, gate_up, down)
        return run(library, x, expert.contiguous(), weight, gate_up, down, activation)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, gate_up, down)):
        raise UserError("gated_few has no gradient; run it under torch.no_grad, or use gated_mixture")
    activation_named(activation)
    x, gate_up, down = operands("gated_few", x, gate_up, down)
    return FORWARD(x, expert, weight, gate_up, down, activation)


def _choose(x: Tensor, expert: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Who computes it: the one place that other implementations are called from."""
    check_few(x, expert, weight, gate_up, down)
    made = few(x, expert, weight, gate_up, down, activation)
    if made is not None:
        return made
    with autocast_off(x.device):
        return _by_choice(x, expert, weight, gate_up, down, activation)


def _by_choice(x: Tensor, expert: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """One pair of matrix-vector products per choice."""
    act, F = activation_named(activation), down.shape[2]
    dtype = sum_dtype(x.dtype)
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    h = x.new_empty(F)
    ups, downs = gate_up.unbind(0), down.unbind(0)
    weights = weight.to(dtype).unbind(0)
    for t, (unit, chosen, total) in enumerate(zip(x.unbind(0), expert.tolist(), y.unbind(0))):
        for k, e in enumerate(chosen):
            if 0 <= e < len(ups):
                both = torch.mv(ups[e], unit)
                act.forward(both[:F], h)
                out = torch.mv(downs[e], h.mul_(both[F:]))
                total.addcmul_(out.to(dtype), weights[t][k])
    return y.to(x.dtype)


_LIBRARY.impl("experts_few", _choose, "CompositeExplicitAutograd")


@torch.library.register_fake("moestro::experts_few")
def _(x: Tensor, expert: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    return x.new_empty(x.shape)
