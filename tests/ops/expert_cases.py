"""Backends of routed experts, and the oracle of their mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.rows import Rows
from moestro.ops.combine import naive as combining
from moestro.ops.expert_mlp import by_expert, choose, naive, stacked
from moestro.ops.expert_mlp.problem import Spec

SMALL = Spec(device="cpu", dtype=torch.float32, rows=20, dim=8, width=12, experts=4)


def backends() -> list[str]:
    """Names of the backends that take a small problem on this machine."""
    return [b.NAME for b in choose.BACKENDS if b.supported(SMALL)[0]]


def prefer(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a backend first; what it does not take goes one expert after the other."""
    first = next(b for b in choose.BACKENDS if name == b.NAME)
    monkeypatch.setattr(choose, "BACKENDS", (first, by_expert))
    monkeypatch.setattr(stacked, "CACHED", 10**9)
    return name


def gated_mixture(x: Tensor, weight: Tensor, index: Rows, gate_up: Tensor, down: Tensor, *rest: Any) -> Tensor:
    """[T, D] float64: gathered, through `gated_mlp`, combined, row by row."""
    out = naive.gated_mlp(combining.gather_rows(x, index), gate_up, down, index.offsets, *rest)
    return combining.combine(out, weight, index)


def mlp_mixture(x: Tensor, weight: Tensor, index: Rows, up: Tensor, down: Tensor, *rest: Any) -> Tensor:
    """[T, D] float64: gathered, through `mlp`, combined, row by row."""
    out = naive.mlp(combining.gather_rows(x, index), up, down, index.offsets, *rest)
    return combining.combine(out, weight, index)
