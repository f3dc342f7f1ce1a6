"""The one place that chooses who computes routed experts."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...core.errors import UserError
from . import by_expert, gpu, native, stacked
from .problem import Grads, Problem, Spec, Wanted

__all__ = ["BACKENDS", "Backend", "choose", "explain"]


class Backend(Protocol):
    """What a module that computes experts offers; see `by_expert`.

    forward: y [T, D] (or [R, D] without gather and combine), and `hidden`, memory of `p.hidden_shape()` that the
    backend lays out as it likes, or anything where `save` is False. backward: contiguous gradients that share no
    memory with anything. Both are functions of their arguments alone, and `supported` of the spec.
    """

    NAME: str

    def supported(self, spec: Spec) -> tuple[bool, str]: ...
    def forward(self, p: Problem, save: bool) -> tuple[Tensor, Tensor]: ...
    def backward(self, p: Problem, hidden: Tensor, grad: Tensor, wanted: Wanted) -> Grads: ...


# In order of preference: compiled kernels; whole products where experts have little to do each; one expert after the
# other.
BACKENDS: tuple[Backend, ...] = (native, gpu, stacked, by_expert)  # pyright: ignore[reportAssignmentType]


def choose(spec: Spec) -> Backend:
    """The first backend that supports the spec. Without `deterministic` there always is one, else `UserError`."""
    for backend in BACKENDS:
        if backend.supported(spec)[0]:
            return backend
    reasons = "; ".join(f"{b.NAME}: {b.supported(spec)[1]}" for b in BACKENDS)
    raise UserError(f"deterministic=True: nothing here promises it for {_about(spec)} ({reasons}); leave it out")


def explain(spec: Spec) -> str:
    """What `choose` takes for the spec and why, one line per backend."""
    able = {b.NAME: b.supported(spec) for b in BACKENDS}
    chosen = next((name for name, (yes, _) in able.items() if yes), "nothing")
    lines = [f"{_about(spec)}: {chosen}"]
    for name, (yes, reason) in able.items():
        mark = "chosen" if name == chosen else "possible" if yes else "not possible"
        lines.append(f"  {name}: {mark} ({reason})")
    return "\n".join(lines)


def _about(spec: Spec) -> str:
    kind = ("clamped " if spec.clamped else "") + ("gated" if spec.gated else "plain")
    kind += " biased" if spec.gated and spec.biased else ""
    return (
        f"{spec.rows} rows of {spec.experts} {kind} experts, D {spec.dim}, F {spec.width}, "
        f"{spec.dtype_name} on {spec.device}"
    )
