"""Expert MLPs against the oracle: activations, starved experts, unequal widths, dtypes, both implementations."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.ops import native
from moestro.ops.expert_mlp import ACTIVATIONS, gated_mlp, mlp, naive, stacked
from moestro.ops.expert_mlp.problem import Spec
from moestro.ops.grouped import fused, loop
from moestro.testing.compare import assert_close
from ops.expert_cases import backends, prefer
from ops.ops_cases import bounds, compare, randn, twice

COUNTS = {
    "uneven": (5, 1, 9, 3),
    "starved": (0, 7, 0, 0, 4, 0),
    "no rows": (0, 0, 0),
    "one row": (0, 1, 0),
    "one expert": (11,),
}
D, F = 8, 12


@pytest.fixture(params=backends(), autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs through every backend that works here; what one does not take goes one expert after the other."""
    return prefer(request.param, monkeypatch)


def gated(E: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(E, 2 * F, D, seed=1, dtype=dtype), randn(E, D, F, seed=2, dtype=dtype)]


def plain(E: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(E, F, D, seed=1, dtype=dtype), randn(E, D, F, seed=2, dtype=dtype)]


def biases(E: int) -> list[Tensor]:
    return [randn(E, F, seed=3), randn(E, D, seed=4)]


def flat(widths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(2 * sum(widths), D, seed=1, dtype=dtype), randn(sum(widths), D, seed=2, dtype=dtype)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("expanded", [False, True])
def test_gated(activation: str, counts: str, expanded: bool) -> None:
    offsets = bounds(*COUNTS[counts])
    compare(
        ["rows", "gate_up", "down"],
        lambda r, u, d: gated_mlp(r, u, d, offsets, activation),
        lambda r, u, d: naive.gated_mlp(r, u, d, offsets, activation),
        [randn(int(offsets[-1]), D), *gated(len(COUNTS[counts]))],
        expanded=expanded,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("biased", [False, True])
def test_plain(activation: str, counts: str, biased: bool) -> None:
    offsets, E = bounds(*COUNTS[counts]), len(COUNTS[counts])
    names = ["rows", "up", "down", "up_bias", "down_bias"]
    tensors = [randn(int(offsets[-1]), D), *plain(E), *(biases(E) if biased else [])]
    compare(
        names[: len(tensors)],
        lambda r, u, d, *b: mlp(r, u, d, offsets, activation, *b),
        lambda r, u, d, *b: naive.mlp(r, u, d, offsets, activation, *b),
        tensors,
    )


@pytest.mark.parametrize("one", [0, 1])
def test_a_single_bias(one: int) -> None:
    offsets = bounds(3, 0, 2)
    bias = biases(3)[one]
    place: list[Tensor | None] = [None, None]

    def given(b: Tensor) -> list[Tensor | None]:
        return [b if i == one else p for i, p in enumerate(place)]

    compare(
        ["rows", "up", "down", "bias"],
        lambda r, u, d, b: mlp(r, u, d, offsets, "gelu", *given(b)),
        lambda r, u, d, b: naive.mlp(r, u, d, offsets, "gelu", *given(b)),
        [randn(5, D), *plain(3), bias],
    )


@pytest.mark.parametrize("widths", [(12, 3, 1, 7), (5, 5, 5, 5)], ids=["unequal", "equal"])
@pytest.mark.parametrize("counts", [(4, 6, 0, 2), (0, 0, 0, 0)], ids=["rows", "no rows"])
def test_unequal_widths(widths: tuple[int, ...], counts: tuple[int, ...]) -> None:
    offsets = bounds(*counts)
    compare(
        ["rows", "gate_up", "down"],
        lambda r, u, d: gated_mlp(r, u, d, offsets, "silu", widths),
        lambda r, u, d: naive.gated_mlp(r, u, d, offsets, "silu", widths),
        [randn(int(offsets[-1]), D), *flat(widths)],
    )


def test_flat_layout_of_equal_widths_is_the_stacked_one() -> None:
    offsets, (up, down) = bounds(4, 0, 3), gated(3)
    x = randn(7, D)
    one = gated_mlp(x, up, down, offsets)
    other = gated_mlp(x, up.reshape(-1, D), down.transpose(1, 2).reshape(-1, D), offsets, widths=(F, F, F))
    assert_close("flat", other, one, 1e-6)


@pytest.mark.parametrize("counts", [c for c in COUNTS if c != "no rows"])
def test_whole_products_through_the_loop(counts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other devices fall back to."""
    monkeypatch.setattr(stacked, "supported", lambda spec: (True, "asked for"))
    monkeypatch.setattr(stacked, "products_for", lambda spec: loop)
    offsets, E = bounds(*COUNTS[counts]), len(COUNTS[counts])
    x = randn(int(offsets[-1]), D)
    compare(
        ["rows", "gate_up", "down"],
        lambda r, u, d: gated_mlp(r, u, d, offsets, "silu"),
        lambda r, u, d: naive.gated_mlp(r, u, d, offsets, "silu"),
        [x, *gated(E)],
    )
    compare(
        ["rows", "up", "down", "up_bias", "down_bias"],
        lambda r, u, d, a, b: mlp(r, u, d, offsets, "gelu", a, b),
        lambda r, u, d, a, b: naive.mlp(r, u, d, offsets, "gelu", a, b),
        [x, *plain(E), *biases(E)],
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_gradcheck(activation: str) -> None:
    offsets = bounds(2, 0, 3)
    x = randn(5, 3, dtype=torch.float64).requires_grad_()
    up, down = randn(3, 8, 3, dtype=torch.float64).requires_grad_(), randn(3, 3, 4).double().requires_grad_()
    torch.autograd.gradcheck(lambda r, u, d: gated_mlp(r, u, d, offsets, activation), (x, up, down))
    wide = randn(3, 3, 8).double().requires_grad_()
    both = [randn(3, 8).double().requires_grad_(), randn(3, 3).double().requires_grad_()]
    torch.autograd.gradcheck(lambda r, u, d, a, b: mlp(r, u, d, offsets, activation, a, b), (x, up, wide, *both))


def test_gradcheck_of_unequal_widths() -> None:
    offsets, widths = bounds(2, 0, 3), (4, 2, 1)
    inputs = [t.requires_grad_() for t in (randn(5, 3).double(), randn(14, 3).double(), randn(7, 3).double())]
    torch.autograd.gradcheck(lambda r, u, d: gated_mlp(r, u, d, offsets, "silu", widths), inputs)


def test_starved_experts_get_exact_zeros() -> None:
    offsets = bounds(0, 4, 0)
    parameters = [t.requires_grad_() for t in (*gated(3), *plain(3), *biases(3))]
    x = randn(4, D)
    a, b, c, d, e, f = parameters
    (gated_mlp(x, a, b, offsets) + mlp(x, c, d, offsets, "gelu", e, f)).sum().backward()
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        assert torch.equal(grad[[0, 2]], torch.zeros_like(grad[[0, 2]]))
        assert bool((grad[1] != 0).any())
    widths = (2, 3, 4)
    up, down = (t.requires_grad_() for t in flat(widths))
    gated_mlp(x, up, down, offsets, "silu", widths).sum().backward()
    assert up.grad is not None
    assert down.grad is not None
    assert not up.grad[:4].any()
    assert not up.grad[10:].any()
    assert not down.grad[:2].any()
    assert not down.grad[5:].any()
    assert bool(up.grad[4:10].any(1).all())


def test_experts_do_not_see_each_others_rows() -> None:
    """NaN in the rows of one expert stays there: in its outputs, row gradients and parameters."""
    offsets, (up, down) = bounds(3, 2), [t.requires_grad_() for t in gated(2)]
    x = randn(6, D)  # the last row is nobody's
    x[3:] = float("nan")
    x.requires_grad_()
    y = gated_mlp(x, up, down, offsets)
    y.sum().backward()
    assert bool(y[:3].isfinite().all())
    assert torch.equal(y[5:], torch.zeros_like(y[5:]))
    assert x.grad is not None
    assert bool(x.grad[:3].isfinite().all())
    assert torch.equal(x.grad[5:], torch.zeros_like(x.grad[5:]))
    for parameter in (up, down):
        assert parameter.grad is not None
        assert bool(parameter.grad[0].isfinite().all())
        assert bool(parameter.grad[1].isnan().any())


def test_non_contiguous_inputs() -> None:
    offsets, (up, down) = bounds(4, 0, 5), gated(3)
    x = randn(D, 9).t()
    strange = (up.transpose(0, 1).contiguous().transpose(0, 1), down.transpose(1, 2).contiguous().transpose(1, 2))
    grad = randn(D, 9, seed=6).t()
    results = []
    for tensors in ((x, up, down), (x, *strange)):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
        y = gated_mlp(leaves[0], leaves[1], leaves[2], offsets)
        y.backward(grad)
        results.append([y, *(t.grad for t in leaves)])
    want = [t.double().requires_grad_() for t in (x, up, down)]
    y = naive.gated_mlp(want[0], want[1], want[2], offsets)
    y.backward(grad.double())
    for result in results:
        for name, a, b in zip(("y", "rows", "gate_up", "down"), result, [y, *(t.grad for t in want)]):
            assert b is not None
            assert_close(name, a, b)


def test_half_precision() -> None:
    offsets = bounds(9, 0, 6)
    x = randn(15, D, dtype=torch.bfloat16)
    compare(
        ["rows", "gate_up", "down"],
        lambda r, u, d: gated_mlp(r, u, d, offsets),
        lambda r, u, d: naive.gated_mlp(r, u, d, offsets),
        [x, *gated(3, torch.bfloat16)],
        tol=1e-2,
    )
    compare(
        ["rows", "up", "down"],
        lambda r, u, d: mlp(r, u, d, offsets),
        lambda r, u, d: naive.mlp(r, u, d, offsets),
        [x, *plain(3, torch.bfloat16)],
        tol=1e-2,
    )


def test_autocast() -> None:
    offsets, widths = bounds(9, 0, 6), (4, 5, 6)
    x = randn(15, D).requires_grad_()
    cases = [
        (gated_mlp, naive.gated_mlp, gated(3), ()),
        (gated_mlp, naive.gated_mlp, flat(widths), ("silu", widths)),
        (mlp, naive.mlp, plain(3), ()),
    ]
    for fast, oracle, tensors, rest in cases:
        parameters = [t.requires_grad_() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16):
            y = fast(x, *parameters, offsets, *rest)
            y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert_close("y", y.float(), oracle(x, *parameters, offsets, *rest), 2e-2)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)


def test_same_bits_twice() -> None:
    offsets = bounds(100, 0, 31)
    x = randn(131, 32)
    twice(lambda r, u, d: gated_mlp(r, u, d, offsets), [x, randn(3, 96, 32), randn(3, 32, 48)])
    twice(lambda r, u, d, b: mlp(r, u, d, offsets, "relu", b), [x, randn(3, 48, 32), randn(3, 32, 48), randn(3, 48)])


def test_only_what_is_asked_for() -> None:
    offsets, (up, down) = bounds(2, 3), gated(2)
    x = randn(5, D).requires_grad_()
    gated_mlp(x, up, down, offsets).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not gated_mlp(x, up, down, offsets).requires_grad


def test_saved_for_the_backward_pass() -> None:
    """Besides the inputs: the pre-activations of R rows, and nothing else that grows with R."""
    offsets, (up, down) = bounds(20, 30), gated(2)
    inputs = [t.requires_grad_() for t in (randn(50, D), up, down)]
    known = {t.untyped_storage().data_ptr() for t in inputs}
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known and t.is_floating_point():
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gated_mlp(inputs[0], inputs[1], inputs[2], offsets)
    assert sum(sizes) == 50 * 2 * F


def test_sizes_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(rows: int, dim: int, width: int, experts: int, dtype: torch.dtype = torch.float32) -> bool:
        spec = Spec(device="cpu", dtype=dtype, rows=rows, dim=dim, width=width, experts=experts)
        return stacked.supported(spec)[0]

    monkeypatch.undo()
    assert whole(8192, 128, 256, 8) == (native.load() is not None)  # our own products are faster at every size
    assert not whole(0, 64, 128, 32)
    assert not whole(64, 64, 128, 32, torch.float64)
    monkeypatch.setattr(importlib.import_module("moestro.ops.grouped.choose"), "BACKENDS", (fused, loop))
    assert whole(4096, 64, 128, 32)
    assert not whole(8192, 128, 256, 8)
    assert not whole(0, 64, 128, 32)
    assert not whole(64, 64, 130, 32)  # rows of 520 bytes
    assert not whole(64, 64, 128, 32, torch.float64)


def test_errors() -> None:
    x, (up, down), offsets = randn(5, D), gated(2), bounds(2, 3)
    with pytest.raises(UserError, match="did you mean 'silu'"):
        gated_mlp(x, up, down, offsets, "silo")
    with pytest.raises(UserError, match="gate_up"):
        gated_mlp(x, up[:, 1:], down, offsets)
    with pytest.raises(UserError, match="offsets"):
        gated_mlp(x, up, down, bounds(5))
    with pytest.raises(UserError, match="rows"):
        mlp(x[None], *plain(2), offsets)
    with pytest.raises(UserError, match=r"\[10, 8\]"):
        gated_mlp(x, *flat((2, 2)), offsets, "silu", (2, 3))
    with pytest.raises(UserError, match="up_bias"):
        mlp(x, *plain(2), offsets, "gelu", randn(F))
