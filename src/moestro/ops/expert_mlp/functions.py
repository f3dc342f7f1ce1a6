"""Expert MLPs as functions: on rows sorted by expert, and from units to their mixture."""

from __future__ import annotations

from torch import Tensor

from ...core.rows import Rows
from ..precision import operands
from .activations import Clamp, activation_named, activation_of
from .op import experts
from .problem import Problem
from .shapes import check_gated, check_mixture, check_mlp

__all__ = ["gated_mixture", "gated_mlp", "mlp", "mlp_mixture"]


def gated_mlp(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    activation: str = "silu",
    widths: tuple[int, ...] | None = None,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    clamp: Clamp | None = None,
    deterministic: bool = False,
    sparse_grad: bool = False,
) -> Tensor:
    """Gated experts on sorted rows: y[r] = down_e (act(gate_e x[r]) * (up_e x[r])), e the expert of row r.

    Shapes: rows [R, D], offsets [E+1] int64 -> [R, D]. Equal widths: gate_up [E, 2F, D] (gate rows first), down
    [E, D, F]. Unequal widths F_e, given in `widths`: the experts' blocks one after the other, gate_up [sum 2F_e, D] and
    down transposed, [sum F_e, D], so that the block of an expert is contiguous in both.
    gate_up_bias [E, 2F] and down_bias [E, D], for equal widths: added to what the matrices give. clamp: in place of the
    activation and the product, the clamped gated unit of GPT-OSS (`Clamp`).
    Experts without rows get gradients of exact zeros. Activations: silu, gelu, gelu_tanh, relu, relu2,
    leaky_relu (slope 0.01).
    deterministic: a row does not depend, to the last bit, on which other rows there are. sparse_grad: the gradients of
    gate_up and down are sparse over the expert axis and hold touched experts only; equal widths and one rank only.
    Raises `UserError` for shapes that do not fit.
    """
    activation_of(activation, clamp)
    check_gated("gated_mlp", rows, gate_up, down, offsets, widths, gate_up_bias, down_bias)
    rows, gate_up, down, gate_up_bias, down_bias = operands("gated_mlp", rows, gate_up, down, gate_up_bias, down_bias)
    return experts(
        Problem(
            x=rows,
            first=gate_up,
            down=down,
            offsets=offsets,
            activation=activation,
            gated=True,
            widths=widths,
            first_bias=gate_up_bias,
            down_bias=down_bias,
            clamp=clamp,
            deterministic=deterministic,
            sparse_grad=sparse_grad,
        )
    )


def mlp(
    rows: Tensor,
    up: Tensor,
    down: Tensor,
    offsets: Tensor,
    activation: str = "gelu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    deterministic: bool = False,
    sparse_grad: bool = False,
) -> Tensor:
    """Plain experts on sorted rows: y[r] = down_e act(up_e x[r] + up_bias_e) + down_bias_e, e the expert of row r.

    Shapes: rows [R, D], up [E, F, D], down [E, D, F], offsets [E+1] int64, up_bias [E, F] or None, down_bias [E, D] or
    None -> [R, D]. Experts without rows get gradients of exact zeros. deterministic, sparse_grad: as in `gated_mlp`.
    Raises `UserError` for shapes that do not fit.
    """
    activation_named(activation)
    check_mlp("mlp", rows, up, down, offsets, up_bias, down_bias)
    rows, up, down, up_bias, down_bias = operands("mlp", rows, up, down, up_bias, down_bias)
    return experts(
        Problem(
            x=rows,
            first=up,
            down=down,
            offsets=offsets,
            activation=activation,
            gated=False,
            first_bias=up_bias,
            down_bias=down_bias,
            deterministic=deterministic,
            sparse_grad=sparse_grad,
        )
    )


def gated_mixture(
    x: Tensor,
    weight: Tensor,
    index: Rows,
    gate_up: Tensor,
    down: Tensor,
    activation: str = "silu",
    widths: tuple[int, ...] | None = None,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    clamp: Clamp | None = None,
    deterministic: bool = False,
    sparse_grad: bool = False,
) -> Tensor:
    """The weighted sum of each unit's gated experts: gather, `gated_mlp` and combine as one operation.

    y[t] = sum over k of weight[t, k] * expert(x[t]), in the order k = 0..K-1; choices without a row add nothing.
    Shapes: x [T, D], weight [T, K] aligned with `index.inverse` (see `table_weight`) -> [T, D]; gate_up, down, biases,
    widths and clamp as in `gated_mlp`. Raises `UserError` for shapes that do not fit.
    """
    activation_of(activation, clamp)
    check_mixture("gated_mixture", x, weight, index)
    check_gated("gated_mixture", x, gate_up, down, index.offsets, widths, gate_up_bias, down_bias)
    x, gate_up, down, gate_up_bias, down_bias = operands("gated_mixture", x, gate_up, down, gate_up_bias, down_bias)
    return experts(
        Problem(
            x=x,
            first=gate_up,
            down=down,
            offsets=index.offsets,
            activation=activation,
            gated=True,
            unit=index.unit,
            slot=index.slot,
            inverse=index.inverse,
            weight=weight,
            widths=widths,
            first_bias=gate_up_bias,
            down_bias=down_bias,
            clamp=clamp,
            deterministic=deterministic,
            sparse_grad=sparse_grad,
        )
    )


def mlp_mixture(
    x: Tensor,
    weight: Tensor,
    index: Rows,
    up: Tensor,
    down: Tensor,
    activation: str = "gelu",
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    deterministic: bool = False,
    sparse_grad: bool = False,
) -> Tensor:
    """The weighted sum of each unit's plain experts: gather, `mlp` and combine as one operation.

    Shapes: x [T, D], weight [T, K] aligned with `index.inverse` -> [T, D]; the rest as in `mlp`. Raises `UserError` for
    shapes that do not fit.
    """
    activation_named(activation)
    check_mixture("mlp_mixture", x, weight, index)
    check_mlp("mlp_mixture", x, up, down, index.offsets, up_bias, down_bias)
    x, up, down, up_bias, down_bias = operands("mlp_mixture", x, up, down, up_bias, down_bias)
    return experts(
        Problem(
            x=x,
            first=up,
            down=down,
            offsets=index.offsets,
            activation=activation,
            gated=False,
            unit=index.unit,
            slot=index.slot,
            inverse=index.inverse,
            weight=weight,
            first_bias=up_bias,
            down_bias=down_bias,
            deterministic=deterministic,
            sparse_grad=sparse_grad,
        )
    )
