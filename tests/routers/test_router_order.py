"""Ordering with exact ties, against Python's stable sort."""

from __future__ import annotations

import pytest
import torch

from moestro.core.signals import Signals
from moestro.routers import Raw, Router, TopK
from moestro.routers.order import descending, highest
from routers.router_cases import exact


def oracle(value: torch.Tensor, k: int) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:k] for row in value.tolist()]


def values(E: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows full of ties: few distinct values, both zeros, negatives, -inf, neighbouring floats."""
    gen = torch.Generator().manual_seed(E)
    some = torch.tensor([0.0, -0.0, 1.0, 1.0 + 2**-23, -1.0, 1e-40, -1e-40, 3e38, 0.25], dtype=dtype)
    mixed = some[torch.randint(len(some), (60, E), generator=gen)]
    return torch.cat([mixed, torch.zeros(1, E, dtype=dtype), torch.randn(20, E, generator=gen, dtype=dtype)])


@pytest.mark.parametrize("E", [3, 8, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_highest_equals_a_stable_sort(E: int, dtype: torch.dtype) -> None:
    value = values(E, dtype)
    for k in sorted({0, 1, 2, 3, min(4, E), min(5, E), min(8, E), min(12, E), E}):
        assert highest(value, k).tolist() == oracle(value, k), k
        alone = [highest(row, k).tolist()[0] for row in value.split(1)]
        assert alone == oracle(value, k), (k, "one token at a time")
    assert descending(value).tolist() == oracle(value, E)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_nan_is_the_highest(rows: int) -> None:
    value = torch.tensor([[0.5, float("nan"), 2.0, float("inf")]]).expand(rows, 4)
    for k in (1, 2, 3):
        assert highest(value, k).tolist() == [[1, 3, 2][:k]] * rows


def test_what_is_masked_comes_last_and_once() -> None:
    value = torch.full((1, 6), float("-inf"))
    value[0, 4], value[0, 2] = -3e38, 1.0
    for k in range(1, 7):
        assert highest(value, k).tolist() == [[2, 4, 0, 1, 3, 5][:k]]


@pytest.mark.parametrize("E", [8, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_equal_logits_go_to_the_lower_index(E: int, dtype: torch.dtype, k: int) -> None:
    router = exact(Router(select=TopK(k=k), weigh=Raw()), E)
    x = torch.zeros(5, E, dtype=dtype)
    x[1, E - 3 :] = 2.0
    x[2, ::2] = -1.0
    x[3] = -0.0
    x[3, 1] = 0.0
    expert = router(x, Signals())[0].expert
    assert expert.tolist() == oracle(x, k)
    assert expert[0].tolist() == list(range(k))
