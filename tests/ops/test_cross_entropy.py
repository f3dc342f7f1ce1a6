"""Chunked cross-entropy: values, gradients, what is ignored, and the largest tensor that is ever made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moestro.core.errors import UserError
from moestro.ops.cross_entropy import chunk_size, cross_entropy, naive
from moestro.testing.compare import assert_close
from ops.ops_cases import compare, generator, rand, randn, twice

T, V, D = 17, 29, 8


def targets(T: int = T, V: int = V) -> Tensor:
    return torch.randint(-1, V, (T,), generator=generator(3))


@pytest.mark.parametrize("chunk", [None, 1, 5, 17, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(chunk: int | None, masked: bool) -> None:
    target, valid = targets(), rand(T) > 0.4 if masked else None
    compare(
        ["h", "head"],
        lambda h, w: cross_entropy(h, w, target, valid, chunk)[0],
        lambda h, w: naive.cross_entropy(h, w, target, valid)[0],
        [randn(T, D), randn(V, D, seed=1)],
    )
    compare(
        ["h", "head", "bias"],
        lambda h, w, b: cross_entropy(h, w, target, valid, chunk, bias=b)[0],
        lambda h, w, b: naive.cross_entropy(h, w, target, valid, b)[0],
        [randn(T, D), randn(V, D, seed=1), randn(V, seed=2)],
    )
    count = cross_entropy(randn(T, D), randn(V, D), target, valid, chunk)[1]
    assert count.dtype == torch.int64
    assert count == naive.cross_entropy(randn(T, D), randn(V, D), target, valid)[1]


def test_equals_torch() -> None:
    h, head, target = randn(T, D), randn(V, D, seed=1), targets()
    want = torch.nn.functional.cross_entropy((h @ head.t()).double(), target, ignore_index=-1, reduction="sum")
    assert_close("nats", cross_entropy(h, head, target)[0], want)


def test_gradcheck() -> None:
    h, head = randn(5, 3, dtype=torch.float64).requires_grad_(), randn(7, 3, seed=1).double().requires_grad_()
    target = torch.tensor([0, 6, -1, 3, 2])
    torch.autograd.gradcheck(lambda a, b: cross_entropy(a, b, target, chunk=2)[0], (h, head))


@pytest.mark.parametrize("case", ["no units", "nothing to predict"])
def test_nothing(case: str) -> None:
    n = 0 if case == "no units" else 4
    h, head = randn(n, D).requires_grad_(), randn(V, D).requires_grad_()
    total, count = cross_entropy(h, head, torch.full((n,), -1))
    total.backward()
    assert (float(total.detach()), int(count)) == (0.0, 0)
    for t in (h, head):
        assert t.grad is not None
        assert not t.grad.any()


def test_what_is_ignored_may_be_anything() -> None:
    """Padding with NaN changes neither loss nor gradients."""
    target, valid = targets(), torch.ones(T, dtype=torch.bool)
    valid[3], target[5] = False, -1
    h = randn(T, D)
    results = []
    for value in (0.0, float("nan"), float("inf")):
        x = h.clone()
        x[3] = x[5] = value
        x.requires_grad_()
        head = randn(V, D, seed=1).requires_grad_()
        total, _ = cross_entropy(x, head, target, valid, chunk=4)
        total.backward()
        results.append((total.detach(), x.grad, head.grad))
    for other in results[1:]:
        for name, a, b in zip(("nats", "h", "head"), other, results[0]):
            assert b is not None
            assert_close(name, a, b, 1e-7)


def test_large_logits() -> None:
    h, head, target = randn(T, D) * 100, randn(V, D, seed=1) * 100, targets()
    assert_close("nats", cross_entropy(h, head, target)[0], naive.cross_entropy(h, head, target)[0])


def test_half_precision_has_fp32_logits() -> None:
    """The inputs are rounded, the logits are not: the error is that of fp32, not of bfloat16."""
    h, head, target = randn(T, D, dtype=torch.bfloat16), randn(V, D, seed=1, dtype=torch.bfloat16), targets()
    total, _ = cross_entropy(h, head, target)
    assert total.dtype == torch.float32
    assert_close("nats", total, naive.cross_entropy(h, head, target)[0], 1e-5)
    compare(
        ["h", "head"],
        lambda a, b: cross_entropy(a, b, target, chunk=4)[0],
        lambda a, b: naive.cross_entropy(a, b, target)[0],
        [h, head],
        tol=5e-3,
    )


def test_half_precision_gradients_are_scaled_in_fp32() -> None:
    """1 / 300 is 0.2 percent away from the nearest bfloat16 number: rounding it would change every gradient by that."""
    h, head, target = randn(T, D, dtype=torch.bfloat16), randn(V, D, seed=1, dtype=torch.bfloat16), targets()
    lengths = []
    for scale in (1.0, 1 / 300):
        x = h.clone().requires_grad_()
        (cross_entropy(x, head, target)[0] * scale).backward()
        assert x.grad is not None
        lengths.append(float(x.grad.double().norm()) / scale)
    assert abs(lengths[1] / lengths[0] - 1) < 5e-4


def test_autocast() -> None:
    h, head, target = randn(T, D).requires_grad_(), randn(V, D, seed=1).requires_grad_(), targets()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = cross_entropy(h, head, target)
        total.backward()
    assert total.dtype == torch.float32
    assert_close("nats", total, naive.cross_entropy(h, head, target)[0], 1e-2)
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (h, head))


def test_frozen_parts() -> None:
    target = targets()
    for which in (0, 1):
        tensors = [randn(T, D), randn(V, D, seed=1)]
        tensors[which].requires_grad_()
        cross_entropy(tensors[0], tensors[1], target)[0].backward()
        assert tensors[which].grad is not None
        assert tensors[1 - which].grad is None


def test_twice_through_the_graph() -> None:
    h, head = randn(T, D).requires_grad_(), randn(V, D, seed=1).requires_grad_()
    total, count = cross_entropy(h, head, targets())
    (total / count).backward(retain_graph=True)
    assert h.grad is not None
    first = h.grad.clone()
    total.backward()
    assert_close("sum of both", h.grad, first * (1 + int(count)))


def test_same_bits_twice() -> None:
    target = targets(50, 300)
    twice(lambda h, w: cross_entropy(h, w, target, chunk=7)[0], [randn(50, 32), randn(300, 32, seed=1)])


def test_non_contiguous_inputs() -> None:
    h, head, target = randn(D, T).t(), randn(D, V).t(), targets()
    assert_close("nats", cross_entropy(h, head, target)[0], naive.cross_entropy(h, head, target)[0])


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns or writes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves((result, args, kwargs)):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits(dtype: torch.dtype) -> None:
    """T 4096, V 50k: the largest tensors are the head, its gradient and the logits of one chunk."""
    T, V, D = 4096, 50_000, 4
    seen = Largest()
    with FakeTensorMode(), seen:  # every operation happens, no number is computed
        h, head = torch.empty(T, D, dtype=dtype).requires_grad_(), torch.empty(V, D, dtype=dtype).requires_grad_()
        total, count = cross_entropy(h, head, torch.zeros(T, dtype=torch.int64))
        (total / count).backward()
        assert h.grad is not None
        assert head.grad is not None
    assert V * D <= seen.numel < T * V / 20
    assert seen.bytes < T * V * 4 / 10
    naively = Largest()
    with FakeTensorMode(), naively:  # the measurement sees logits where there are any
        h, head = torch.empty(T, D, dtype=dtype), torch.empty(V, D, dtype=dtype)
        torch.nn.functional.cross_entropy((h @ head.t()).float(), torch.zeros(T, dtype=torch.int64))
    assert naively.numel == T * V


def test_no_gradient_is_computed_when_none_is_wanted() -> None:
    h, head = randn(200, D), randn(100, D).requires_grad_()
    seen = Largest()
    with seen, torch.no_grad():
        total, _ = cross_entropy(h, head, torch.zeros(200, dtype=torch.int64), chunk=1)
    assert not total.requires_grad
    assert seen.numel == 200 * D


def test_chunk_size() -> None:
    assert chunk_size(50_000) * 50_000 * 4 <= 16 * 2**20 < (chunk_size(50_000) + 1) * 50_000 * 4
    assert chunk_size(50_000, torch.bfloat16) == chunk_size(50_000)  # logits are fp32
    assert chunk_size(50_000, torch.float64) == chunk_size(100_000)
    assert chunk_size(10**9) == 64
    assert chunk_size(50_000, torch.float32, "cuda") > 10 * chunk_size(50_000)


def test_errors() -> None:
    with pytest.raises(UserError, match="head"):
        cross_entropy(randn(T, D), randn(V, D + 1), targets())
    with pytest.raises(UserError, match="target must be"):
        cross_entropy(randn(T, D), randn(V, D), targets(T + 1))
    with pytest.raises(UserError, match="valid must be"):
        cross_entropy(randn(T, D), randn(V, D), targets(), torch.ones(3, dtype=torch.bool))
    with pytest.raises(UserError, match="chunk"):
        cross_entropy(randn(T, D), randn(V, D), targets(), chunk=0)
    with pytest.raises(UserError, match="empty"):
        cross_entropy(randn(T, D), randn(0, D), targets())
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(randn(T, D), randn(V, D), torch.full((T,), V))
