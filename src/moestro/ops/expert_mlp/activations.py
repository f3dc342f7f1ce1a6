"""Activations with their derivatives, writing into given buffers."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...core.errors import UserError, did_you_mean

__all__ = ["ACTIVATIONS", "Activation", "Clamp", "activation_named", "activation_of", "lifted"]

LEAK = 0.01  # slope of leaky_relu below 0
_aten = torch.ops.aten


class _Forward(Protocol):
    def __call__(self, x: Tensor, out: Tensor) -> object: ...


class _Backward(Protocol):
    def __call__(self, grad: Tensor, x: Tensor, out: Tensor) -> object: ...


class Activation(NamedTuple):
    """forward(x, out) writes act(x); backward(grad, x, out) writes grad * act'(x). `out` may be `grad`, never `x`."""

    forward: _Forward
    backward: _Backward


def _silu(x: Tensor, out: Tensor) -> object:
    return _aten.silu.out(x, out=out)


def _silu_back(grad: Tensor, x: Tensor, out: Tensor) -> object:
    return _aten.silu_backward.grad_input(grad, x, grad_input=out)


def _gelu(x: Tensor, out: Tensor) -> object:
    return _aten.gelu.out(x, out=out)


def _gelu_back(grad: Tensor, x: Tensor, out: Tensor) -> object:
    return _aten.gelu_backward.grad_input(grad, x, grad_input=out)


def _gelu_tanh(x: Tensor, out: Tensor) -> object:
    return _aten.gelu.out(x, approximate="tanh", out=out)


def _gelu_tanh_back(grad: Tensor, x: Tensor, out: Tensor) -> object:
    return _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)


def _relu(x: Tensor, out: Tensor) -> object:
    return torch.clamp_min(x, 0, out=out)


def _relu_back(grad: Tensor, x: Tensor, out: Tensor) -> object:
    return _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


def _relu2(x: Tensor, out: Tensor) -> object:
    return torch.clamp_min(x, 0, out=out).square_()


def _relu2_back(grad: Tensor, x: Tensor, out: Tensor) -> object:
    slope = x.clamp_min(0)
    return torch.mul(grad, slope.mul_(2), out=out)


def _leaky(x: Tensor, out: Tensor) -> object:
    return _aten.leaky_relu.out(x, LEAK, out=out)


def _leaky_back(grad: Tensor, x: Tensor, out: Tensor) -> object:
    return _aten.leaky_relu_backward.grad_input(grad, x, LEAK, False, grad_input=out)


class Clamp(NamedTuple):
    """The clamped gated unit of GPT-OSS: min(g, limit) * sigmoid(alpha * min(g, limit)) * (clamp(u, +-limit) + 1), g
    what the gate gives, u what up gives. Gradients vanish outside the limits."""

    alpha: float
    limit: float

    def forward(self, x: Tensor, out: Tensor) -> object:
        torch.clamp_max(x, self.limit, out=out)
        return out.mul_(torch.sigmoid(out * self.alpha))

    def backward(self, grad: Tensor, x: Tensor, out: Tensor) -> object:
        z = x.clamp_max(self.limit)
        s = torch.sigmoid(z * self.alpha)
        slope = s.addcmul(z * s, 1 - s, value=self.alpha).mul_(x <= self.limit)
        return torch.mul(grad, slope, out=out)

    def inside(self, up: Tensor) -> Tensor:
        """Where a change of u changes anything."""
        return up.abs() <= self.limit


def lifted(up: Tensor, clamp: Clamp | None) -> Tensor:
    """What the activated gate is multiplied with: u, or with a clamp clamp(u) + 1."""
    return up if clamp is None else up.clamp(-clamp.limit, clamp.limit).add_(1)


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(_silu, _silu_back),
    "gelu": Activation(_gelu, _gelu_back),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_back),
    "relu": Activation(_relu, _relu_back),
    "relu2": Activation(_relu2, _relu2_back),
    "leaky_relu": Activation(_leaky, _leaky_back),
}


def activation_named(name: str) -> Activation:
    """The activation called `name`, or a `UserError` that lists the known ones."""
    if name not in ACTIVATIONS:
        raise UserError(
            f"unknown activation {name!r}{did_you_mean(name, ACTIVATIONS)}; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def activation_of(name: str, clamp: Clamp | None) -> Activation:
    """The activation of the gate: the one called `name`, or that of the clamp, which replaces "silu"."""
    if clamp is None:
        return activation_named(name)
    if name != "silu":
        raise UserError(f"a clamped gated unit has an activation of its own; leave out {name!r}")
    return Activation(clamp.forward, clamp.backward)
