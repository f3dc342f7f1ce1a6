"""Routed experts in compiled C on the CPU: gather, both products, activation and combine in one call, fp32."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import native
from ..pages import large_pages
from .activations import ACTIVATIONS
from .problem import Grads, Problem, Spec, Wanted

__all__ = ["backward", "forward", "supported"]

NAME = "native"
_CODES = {name: number for number, name in enumerate(ACTIVATIONS)}  # the order of mathv.h


class _Call(ctypes.Structure):
    """`problem_t` of experts.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "unit", "offsets", "weight", "inverse", "slot")),
        *((name, ctypes.c_void_p) for name in ("first", "down", "first_bias", "down_bias", "widths")),
        *((name, ctypes.c_int64) for name in "TRKEDF"),
        *((name, ctypes.c_int) for name in ("activation", "gated", "ordered", "threads")),
        *((name, ctypes.c_void_p) for name in ("out", "y", "hidden", "grad", "d_hidden", "kept", "dots")),
        *((name, ctypes.c_void_p) for name in ("d_x", "d_weight", "d_first", "d_down", "d_first_bias", "d_down_bias")),
        ("scratch", ctypes.c_void_p),
        ("scratch_size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("tasks", "place")),
    ]


def supported(spec: Spec) -> tuple[bool, str]:
    """Whether this backend takes such a problem, and why (not)."""
    if spec.device != "cpu":
        return False, f"runs on the CPU, not on {spec.device}"
    if spec.dtype != torch.float32:
        return False, f"has fp32 only, not {spec.dtype_name}"
    if spec.clamped:
        return False, "has no clamped gated unit"
    if spec.gated and spec.biased:
        return False, "has no biases of gated experts"
    if min(spec.rows, spec.dim, spec.width, spec.experts) == 0:
        return False, "there is nothing to compute"
    if native.load() is None:
        return False, native.reason()
    return True, native.reason()


def forward(p: Problem, save: bool) -> tuple[Tensor, Tensor]:
    """y [T, D] (or [R, D] of rows) and the values before the activation, [R, 2F] gated or [R, F], if `save`."""
    with _Prepared(p) as call:
        R, D = p.num_rows, p.x.shape[1]
        out = call.new("out", R, D)
        y = out if p.unit is None else call.new("y", p.x.shape[0], D)
        hidden = call.new("hidden", R, _factor(p) * p.width) if save else p.x.new_empty(0)
        call.run(backward=False)
    if p.unit is None:
        y[int(p.offsets[-1]) :].zero_()
    return y, hidden


def backward(p: Problem, hidden: Tensor, grad: Tensor, wanted: Wanted, place: Tensor | None = None) -> Grads:
    """The gradients. place: [E] int64, where the gradient of each expert's parameters goes, counted from 0, -1 =
    nowhere: the gradients of parameters then have one entry per place."""
    with _Prepared(p) as call:
        R, F = p.num_rows, p.width
        call.take("hidden", hidden)
        call.take("grad", grad.contiguous())
        call.new("d_hidden", R, _factor(p) * F)
        call.new("kept", R, F)
        d_x = d_weight = None
        if wanted.x and p.unit is None:
            d_x = call.new("out", *p.x.shape)
        elif wanted.x:
            call.new("out", R, p.x.shape[1])
            d_x = call.new("d_x", *p.x.shape)
        if wanted.weight and p.weight is not None:
            call.new("dots", R)
            d_weight = call.new("d_weight", *p.weight.shape)
        if place is not None:
            call.take("place", place)
        of = {"d_first": p.first, "d_down": p.down, "d_first_bias": p.first_bias, "d_down_bias": p.down_bias}
        asked = (wanted.first, wanted.down, wanted.first_bias, wanted.down_bias)
        count = None if place is None else int(place.max()) + 1
        made = [
            call.new(name, count or tensor.shape[0], *tensor.shape[1:]) if want and tensor is not None else None
            for (name, tensor), want in zip(of.items(), asked)
        ]
        call.run(backward=True)
    if d_x is not None and p.unit is None:
        d_x[int(p.offsets[-1]) :].zero_()
    return Grads(d_x, d_weight, *made)


def _factor(p: Problem) -> int:
    return 2 if p.gated else 1


class _Prepared:
    """One call of the library: its arguments, and the tensors that they point into, kept until it is over."""

    def __init__(self, p: Problem) -> None:
        library = native.load()
        assert library is not None
        self.library, self.like, self.kept = library, p.x, []
        K = 0 if p.inverse is None else p.inverse.shape[1]
        self.call = _Call(
            T=p.x.shape[0],
            R=p.num_rows,
            K=K,
            E=p.num_experts,
            D=p.x.shape[1],
            F=p.width,
            activation=_CODES[p.activation],
            gated=p.gated,
            ordered=p.deterministic,
            threads=torch.get_num_threads(),
        )
        for name in ("x", "unit", "offsets", "weight", "inverse", "slot", "first", "down", "first_bias", "down_bias"):
            self.take(name, getattr(p, name))
        if p.widths is not None:
            self.take("widths", torch.tensor(p.widths, dtype=torch.int64))

    def __enter__(self) -> _Prepared:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kept.clear()

    def take(self, name: str, tensor: Tensor | None) -> None:
        """Hand a tensor over; a strided one is copied."""
        if tensor is not None:
            tensor = tensor.contiguous()
            self.kept.append(tensor)
            setattr(self.call, name, tensor.data_ptr())

    def new(self, name: str, *shape: int) -> Tensor:
        """A tensor for a result."""
        tensor = large_pages(self.like.new_empty(shape), fresh=True)
        self.take(name, tensor)
        return tensor

    def run(self, backward: bool) -> None:
        sizes = (ctypes.c_int64 * 2)()
        self.library.moestro_experts_sizes(ctypes.byref(self.call), backward, sizes)
        self.take("scratch", self.like.new_empty(self.call.threads * sizes[0]))
        self.call.scratch_size = sizes[0]
        self.take("tasks", torch.empty(sizes[1], dtype=torch.int64))
        function = self.library.moestro_experts_backward if backward else self.library.moestro_experts_forward
        function(ctypes.byref(self.call))
