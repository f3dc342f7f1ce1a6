"""`check_optimizer`: a stack of experts is stepped as the experts would be by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.params import ParamInfo
from .compare import assert_close

__all__ = ["check_optimizer"]


class _Bank(nn.Module):
    """A stack of fused matrices [E, parts * A, B]."""

    def __init__(self, values: Tensor, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.clone())
        self.parts = parts

    def param_info(self) -> dict[str, ParamInfo]:
        axis = 0 if self.weight.ndim == 3 else None
        axes = (1, 2) if self.weight.ndim == 3 else (0, 1)
        return {"weight": ParamInfo(role="expert", expert_axis=axis, matrix_axes=axes, parts=self.parts)}


def check_optimizer(build: Callable[[nn.Module], Any], *, steps: int = 3, tol: float = 1e-4) -> None:
    """Raise `AssertionError` unless the optimiser steps every expert, and gate and up, as matrices of their own.

    build: model -> optimiser with `step(factor)` and `clear()`, as configs of optimisers build it. The gradients of the
    experts differ in size by orders of magnitude, so that a stack that is taken for one matrix shows.
    """
    generator = torch.Generator().manual_seed(7)
    for parts, (A, B) in ((("gate", "up"), (6, 10)), ((), (10, 6))):
        E, P = 3, max(1, len(parts))
        values = torch.randn(E, P * A, B, generator=generator)
        size = torch.tensor([1.0, 30.0, 0.02])[:, None, None]
        grads = [torch.randn(E, P * A, B, generator=generator) * size for _ in range(steps)]
        stack = _Bank(values, parts)
        _run(build, stack, grads)
        for e in range(E):
            for i in range(P):
                rows = slice(i * A, (i + 1) * A)
                alone = _Bank(values[e, rows], ())
                _run(build, alone, [g[e, rows] for g in grads])
                name = f"expert {e}{', ' + parts[i] if parts else ''}: stepped in its stack and alone"
                moved, own = stack.weight[e, rows] - values[e, rows], alone.weight - values[e, rows]
                assert_close(name, moved, own, tol)


def _run(build: Callable[[nn.Module], Any], model: _Bank, grads: list[Tensor]) -> None:
    optimizer = build(model)
    for grad in grads:
        model.weight.grad = grad.clone()
        optimizer.step(1.0)
        optimizer.clear()
