"""Experts with packed weights, without a gradient: `moestro::packed_few`, `packed_rows` and `packed_linear`."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from ...core.errors import UserError
from ..expert_mlp import gated_mlp, mlp
from ..expert_mlp.activations import activation_named
from ..few.kernels import kernels as fast
from ..precision import autocast_off
from . import kernels
from .format import Packed, unpack

__all__ = ["FEW", "packed_few", "packed_linear", "packed_rows"]

FEW = 32
"""The most choices, T * K, or rows of a product, for which reading the packed weights beats unpacking them."""

_MATRICES = "str kind, Tensor first, Tensor? first_scale, Tensor down, Tensor? down_scale, int width"
_LIBRARY = torch.library.Library("moestro", "FRAGMENT")
_LIBRARY.define(
    f"packed_few(Tensor x, Tensor expert, Tensor weight, {_MATRICES}, str activation, bool gated) -> Tensor"
)
_LIBRARY.define(
    f"packed_rows(Tensor rows, Tensor offsets, {_MATRICES}, str activation, bool gated, Tensor? first_bias, "
    "Tensor? down_bias, bool deterministic) -> Tensor"
)
_LIBRARY.define("packed_linear(Tensor x, str kind, Tensor data, Tensor? scale) -> Tensor")
_FEW = torch.ops.moestro.packed_few.default
_ROWS = torch.ops.moestro.packed_rows.default
_LINEAR = torch.ops.moestro.packed_linear.default


def packed_few(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    first: Packed,
    down: Packed,
    activation: str = "silu",
    gated: bool = True,
) -> Tensor:
    """The weighted sum of each unit's experts, from a table of choices; for decoding.

    Shapes: x [T, D], expert [T, K] int64 (ids outside 0..E-1 add nothing), weight [T, K]; first [E, 2F, D] with the
    gate's rows first, or [E, F, D] where not gated; down [E, D, F] -> [T, D]. Sums are fp32, k = 0..K-1. Has no
    gradient: `UserError` where one is asked for, or for shapes that do not fit.
    """
    activation_named(activation)
    _check("packed_few", x, first, down, gated)
    if expert.shape != weight.shape or expert.ndim != 2 or expert.shape[0] != x.shape[0]:
        raise UserError(
            f"packed_few: expert {list(expert.shape)} and weight {list(weight.shape)} must both be [T, K] with T = "
            f"{x.shape[0]}"
        )
    library = fast(x)
    if library is not None:  # nobody looks on, and going through the op would cost as much as the layer
        made = kernels.few(library, x, expert, weight, first, down, activation, gated)
        if made is not None:
            return made
    _no_gradient("packed_few", x, weight)
    return _FEW(
        x, expert, weight, first.kind, first.data, first.scale, down.data, down.scale, down.inputs, activation, gated
    )


def packed_rows(
    rows: Tensor,
    offsets: Tensor,
    first: Packed,
    down: Packed,
    activation: str = "silu",
    gated: bool = True,
    first_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Experts on rows sorted by expert: each expert with rows is unpacked into scratch, then as `gated_mlp` or `mlp`.

    Shapes: rows [R, D], offsets [E+1] -> [R, D]; first and down as in `packed_few`; first_bias [E, F], down_bias [E, D]
    for plain experts. deterministic: a row does not depend, to the last bit, on which other rows there are. Has no
    gradient: `UserError` where one is asked for, or for shapes that do not fit.
    """
    _no_gradient("packed_rows", rows)
    activation_named(activation)
    _check("packed_rows", rows, first, down, gated)
    if offsets.shape != (down.data.shape[0] + 1,):
        raise UserError(f"packed_rows: {down.data.shape[0]} experts need one offset more, not {list(offsets.shape)}")
    if gated and not (first_bias is None and down_bias is None):
        raise UserError("packed_rows: gated experts have no biases")
    matrices = (first.kind, first.data, first.scale, down.data, down.scale, down.inputs)
    return _ROWS(rows, offsets, *matrices, activation, gated, first_bias, down_bias, deterministic)


def packed_linear(x: Tensor, weight: Packed) -> Tensor:
    """x w^T. Shapes: x [.., I], weight [O, I] -> [.., O]. Has no gradient: `UserError` where one is asked for."""
    if len(weight.shape) != 2 or x.shape[-1] != weight.inputs:
        raise UserError(f"packed_linear: weight {list(weight.shape)} does not fit x {list(x.shape)}")
    if x.numel() <= FEW * x.shape[-1]:
        made = kernels.product(fast(x), x, weight)
        if made is not None:
            return made
    _no_gradient("packed_linear", x)
    return _LINEAR(x, weight.kind, weight.data, weight.scale)


def _no_gradient(what: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise UserError(f"{what}: packed weights have no gradient; run it under torch.no_grad, or use fp32 weights")


def _check(what: str, x: Tensor, first: Packed, down: Packed, gated: bool) -> None:
    E, F, D = down.data.shape[0], down.inputs, down.data.shape[1]
    if x.ndim != 2 or x.shape[1] != D or first.shape != (E, (2 if gated else 1) * F, D) or first.kind != down.kind:
        raise UserError(
            f"{what}: {first.kind} {list(first.shape)} and {down.kind} {list(down.shape)} do not fit each other and "
            f"x {list(x.shape)}; wanted [E, {'2F' if gated else 'F'}, D], [E, D, F] of one kind and [T, D]"
        )


def _few(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    kind: str,
    first: Tensor,
    first_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    width: int,
    activation: str,
    gated: bool,
) -> Tensor:
    w1 = Packed(kind, first, first_scale, x.shape[1])  # type: ignore[arg-type]
    w2 = Packed(kind, down, down_scale, width)  # type: ignore[arg-type]
    made = kernels.few(kernels.loaded(x), x, expert, weight, w1, w2, activation, gated)
    return _by_choice(x, expert, weight, w1, w2, activation, gated) if made is None else made


def _by_choice(
    x: Tensor, expert: Tensor, weight: Tensor, first: Packed, down: Packed, activation: str, gated: bool
) -> Tensor:
    """One pair of matrix-vector products per choice, on unpacked weights."""
    act, F = activation_named(activation), down.inputs
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    units, weights = x.float(), weight.float()
    h = units.new_empty(F)
    with autocast_off(x.device):
        for t, chosen in enumerate(expert.tolist()):
            for k, e in enumerate(chosen):
                if 0 <= e < down.data.shape[0]:
                    made = torch.mv(unpack(first[e]), units[t])
                    act.forward(made[:F], h)
                    out = torch.mv(unpack(down[e]), h.mul_(made[F:]) if gated else h)
                    y[t].addcmul_(out, weights[t, k])
    return y.to(x.dtype)


def _rows(
    rows: Tensor,
    offsets: Tensor,
    kind: str,
    first: Tensor,
    first_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    width: int,
    activation: str,
    gated: bool,
    first_bias: Tensor | None,
    down_bias: Tensor | None,
    deterministic: bool,
) -> Tensor:
    w1 = Packed(kind, first, first_scale, rows.shape[1])  # type: ignore[arg-type]
    w2 = Packed(kind, down, down_scale, width)  # type: ignore[arg-type]
    y = torch.zeros_like(rows, memory_format=torch.contiguous_format)  # rows after the last expert's are nobody's
    bounds = offsets.tolist()
    for e, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop == start:
            continue
        part, ends = rows[start:stop], offsets.new_tensor([0, stop - start])
        a, b = (kernels.unpacked(m[e]).to(rows.dtype)[None] for m in (w1, w2))
        with autocast_off(rows.device):
            if gated:
                y[start:stop] = gated_mlp(part, a, b, ends, activation, deterministic=deterministic)
            else:
                c, d = (None if m is None else m[e : e + 1].to(rows.dtype) for m in (first_bias, down_bias))
                y[start:stop] = mlp(part, a, b, ends, activation, c, d, deterministic=deterministic)
    return y


def _linear(x: Tensor, kind: str, data: Tensor, scale: Tensor | None) -> Tensor:
    weight = Packed(kind, data, scale, x.shape[-1])  # type: ignore[arg-type]
    made = kernels.product(kernels.loaded(x), x, weight) if x.numel() <= FEW * x.shape[-1] else None
    if made is not None:
        return made
    with autocast_off(x.device):
        return functional.linear(x, kernels.unpacked(weight).to(x.dtype))


_LIBRARY.impl("packed_few", _few, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_rows", _rows, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_linear", _linear, "CompositeExplicitAutograd")


@torch.library.register_fake("moestro::packed_few")
def _(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("moestro::packed_rows")
def _(rows: Tensor, *rest: object) -> Tensor:
    return rows.new_empty(rows.shape)


@torch.library.register_fake("moestro::packed_linear")
def _(x: Tensor, kind: str, data: Tensor, scale: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], data.shape[0])
