"""Triton functions: the activations and their derivatives, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["KNOWN", "activate", "slope"]

KNOWN = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "leaky_relu")


@triton.jit
def _bent(x):
    """The argument of the logistic form of gelu_tanh: x (1 + tanh(u)) / 2 = x sigmoid(2u)."""
    return 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """act(x)."""
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif ACT == "gelu_tanh":
        return x * tl.sigmoid(_bent(x))
    elif ACT == "relu":
        return tl.where(x < 0.0, 0.0, x)  # NaN stays NaN
    elif ACT == "relu2":
        y = tl.where(x < 0.0, 0.0, x)
        return y * y
    else:
        tl.static_assert(ACT == "leaky_relu")
        return tl.where(x < 0.0, 0.01 * x, x)


@triton.jit
def slope(x, ACT: tl.constexpr):
    """act'(x)."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(_bent(x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACT == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "relu2":
        return tl.where(x < 0.0, 0.0, 2.0 * x)
    else:
        tl.static_assert(ACT == "leaky_relu")
        return tl.where(x > 0.0, 1.0, 0.01)
