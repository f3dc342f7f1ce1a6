"""Routed experts as registered ops: `moestro::experts` and `moestro::experts_backward`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import UserError
from ..precision import autocast_off
from .activations import Clamp
from .choose import choose
from .problem import Problem, Wanted
from .touched import check_sparse, compact, sparse

__all__ = ["BACKWARD", "FORWARD", "experts"]

_PROBLEM = (
    "Tensor x, Tensor first, Tensor down, Tensor offsets, str activation, bool gated, Tensor? unit, Tensor? slot, "
    "Tensor? inverse, Tensor? weight, Tensor? first_bias, Tensor? down_bias, int[]? widths, bool deterministic, "
    "float[]? clamp"
)
_FIELDS = (
    *("x", "first", "down", "offsets", "activation", "gated", "unit", "slot", "inverse", "weight"),
    *("first_bias", "down_bias"),
)
_SAVE = len(_FIELDS) + 3  # where `save` stands in the forward op
_LIBRARY = torch.library.Library("moestro", "FRAGMENT")
_LIBRARY.define(f"experts({_PROBLEM}, bool save, bool sparse_grad=False) -> (Tensor y, Tensor hidden)")
_LIBRARY.define(
    f"experts_backward(Tensor grad, Tensor hidden, {_PROBLEM}, bool[] wanted) -> "
    "(Tensor x, Tensor weight, Tensor first, Tensor down, Tensor first_bias, Tensor down_bias)"
)
_LIBRARY.define(
    f"experts_backward_touched(Tensor grad, Tensor hidden, {_PROBLEM}, bool[] wanted) -> (Tensor x, Tensor weight, "
    "Tensor first, Tensor down, Tensor first_bias, Tensor down_bias, Tensor touched)"
)
FORWARD = torch.ops.moestro.experts.default
BACKWARD = torch.ops.moestro.experts_backward.default
TOUCHED = torch.ops.moestro.experts_backward_touched.default


def experts(p: Problem) -> Tensor:
    """y of a problem, by whichever backend is chosen for it; differentiable in all floating tensors."""
    floats = (p.x, p.first, p.down, p.weight, p.first_bias, p.down_bias)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floats)
    if p.sparse_grad and save:
        check_sparse()
    return FORWARD(*_arguments(p), save, p.sparse_grad)[0]


def _arguments(p: Problem) -> tuple[Any, ...]:
    """The fields of a problem in the order of the schema."""
    return (
        *(getattr(p, name) for name in _FIELDS),
        p.widths,
        p.deterministic,
        None if p.clamp is None else list(p.clamp),
    )


def _problem(arguments: Sequence[Any]) -> Problem:
    """The problem that has these fields, in the order of the schema."""
    *fields, widths, deterministic, clamp = arguments
    widths = None if widths is None else tuple(widths)
    clamp = None if clamp is None else Clamp(*clamp)
    return Problem(**dict(zip(_FIELDS, fields, strict=True)), widths=widths, deterministic=deterministic, clamp=clamp)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, save = arguments[: _SAVE + 1]
    p = _problem(fields)
    with autocast_off(p.x.device):
        y, hidden = choose(p.spec()).forward(p, save)
    return y, hidden if save else p.x.new_empty(0)


def _backward(grad: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *fields, wanted = arguments
    p = _problem(fields)
    with autocast_off(p.x.device):
        grads = choose(p.spec()).backward(p, hidden, grad.contiguous(), Wanted(*wanted))  # it may be expanded
    return tuple(grad.new_empty(0) if g is None else g for g in grads)


def _backward_touched(grad: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *fields, wanted = arguments
    p = _problem(fields)
    with autocast_off(p.x.device):
        grads, touched = compact(choose(p.spec()), p, hidden, grad.contiguous(), Wanted(*wanted))
    return *(grad.new_empty(0) if g is None else g for g in grads), touched


_LIBRARY.impl("experts_backward_touched", _backward_touched, "CompositeExplicitAutograd")
_LIBRARY.impl("experts", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("experts_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("moestro::experts")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, save = arguments[: _SAVE + 1]
    p = _problem(fields)
    units = p.x.shape[0] if p.inverse is None else p.inverse.shape[0]
    R, H = p.hidden_shape()
    return p.x.new_empty(units, p.x.shape[1]), p.x.new_empty((R, H) if save else 0)


@torch.library.register_fake("moestro::experts_backward")
def _(grad: Tensor, hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *fields, wanted = arguments
    p = _problem(fields)
    tensors = (p.x, p.weight, p.first, p.down, p.first_bias, p.down_bias)
    return tuple(
        t.new_empty(t.shape) if asked and t is not None else grad.new_empty(0)
        for t, asked in zip(tensors, wanted, strict=True)
    )


# Where the tensors that may need a gradient stand among the arguments, in the order of `Wanted`.
_PLACES = (0, 9, 1, 2, 10, 11)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *fields, ctx.saved, ctx.sparse = inputs
    ctx.set_materialize_grads(False)  # nobody differentiates `hidden`: a gradient of zeros for it would cost a pass
    ctx.rest = [None if isinstance(f, Tensor) else f for f in fields]
    ctx.save_for_backward(*(f if isinstance(f, Tensor) else None for f in fields), output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None] * (len(ctx.rest) + 2)
    if grad is None:
        return tuple(found)
    if not ctx.saved:
        raise UserError("moestro::experts was called with save=False: it has no gradient")
    *tensors, hidden = ctx.saved_tensors
    arguments = [r if t is None else t for t, r in zip(tensors, ctx.rest)]
    wanted = [bool(ctx.needs_input_grad[i]) for i in _PLACES]
    if not ctx.sparse:
        grads = BACKWARD(grad, hidden, *arguments, wanted)
    else:
        *values, touched = TOUCHED(grad, hidden, *arguments, wanted)
        parameters = [arguments[place] for place in _PLACES[2:]]
        grads = [
            *values[:2],
            *(
                sparse(v, touched, t) if t is not None and v.ndim == t.ndim else v
                for v, t in zip(values[2:], parameters)
            ),
        ]
    for place, asked, value in zip(_PLACES, wanted, grads):
        found[place] = value if asked else None
    return tuple(found)


def _twice(*_: Any) -> None:
    raise UserError("the gradient of routed experts cannot be differentiated again")


torch.library.register_autograd("moestro::experts", _differentiate, setup_context=_keep)
torch.library.register_autograd("moestro::experts_backward", _twice)
