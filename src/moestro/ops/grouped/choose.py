"""The one place that chooses how grouped products are computed."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from . import fused, loop, native
from .spec import Spec

__all__ = ["BACKENDS", "Backend", "choose", "explain"]


class Backend(Protocol):
    """What a module of products offers; see `loop`."""

    NAME: str

    def supported(self, spec: Spec) -> tuple[bool, str]: ...
    def products(self, rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor: ...
    def transposed_products(self, grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor: ...
    def outer(self, grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor: ...
    def columns(self, grad: Tensor, offsets: Tensor) -> Tensor: ...


# In order of preference. Measured on the CPU in fp32, D 512, F 512, E 32, 8 and 256 rows per expert: the C kernels take
# 0.2 to 0.6 of the others' time in every product. The other two run the same matrix kernels; grouped_mm saves the
# interpreter 4 us per expert, which is 10 % of the time where products are small (D 128, F 64), else nothing.
BACKENDS: tuple[Backend, ...] = (native, fused, loop)  # pyright: ignore[reportAssignmentType]


def choose(*specs: Spec) -> Backend:
    """The first backend that supports all the specs; the loop supports everything."""
    return next(b for b in BACKENDS if all(b.supported(s)[0] for s in specs))


def explain(spec: Spec) -> str:
    """What `choose` takes for the spec and why, one line per backend."""
    chosen = choose(spec)
    lines = [
        f"grouped product of {spec.rows} rows, {spec.experts} x [{spec.outputs}, {spec.inputs}], "
        f"{spec.dtype_name} on {spec.device}: {chosen.NAME}"
    ]
    for backend in BACKENDS:
        able, reason = backend.supported(spec)
        mark = "chosen" if backend is chosen else "possible" if able else "not possible"
        lines.append(f"  {backend.NAME}: {mark} ({reason})")
    return "\n".join(lines)
