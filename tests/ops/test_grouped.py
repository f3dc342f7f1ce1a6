"""The grouped product: its backends against the oracle, their choice, and the quirks that are kept away."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.ops.grouped import Spec, choose, explain, fused, grouped_linear, loop, naive, native
from moestro.testing.compare import assert_close
from ops.ops_cases import bounds, compare, randn, twice

COUNTS = {
    "uneven": (5, 1, 9, 3),
    "starved": (0, 7, 0, 0, 4, 0),
    "no rows": (0, 0, 0),
    "one row": (0, 1, 0),
    "one expert": (11,),
}


@pytest.mark.usefixtures("each_grouped_backend")
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("sizes", [(8, 12), (5, 3)], ids=["aligned", "odd"])
def test_values_and_gradients(counts: str, bias: bool, expanded: bool, sizes: tuple[int, int]) -> None:
    E, (inputs, outputs) = len(COUNTS[counts]), sizes
    offsets = bounds(*COUNTS[counts])
    tensors = [randn(int(offsets[-1]), inputs), randn(E, outputs, inputs, seed=1)]
    if bias:
        tensors.append(randn(E, outputs, seed=2))
    compare(
        ["rows", "weight", "bias"][: len(tensors)],
        lambda r, w, *b: grouped_linear(r, w, offsets, *b),
        lambda r, w, *b: naive.grouped_linear(r, w, offsets, *b),
        tensors,
        expanded=expanded,
    )


@pytest.mark.usefixtures("each_grouped_backend")
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("sizes", [(8, 12), (5, 3)], ids=["aligned", "odd"])
def test_transposed_weights(counts: str, sizes: tuple[int, int]) -> None:
    E, (inputs, outputs) = len(COUNTS[counts]), sizes
    offsets = bounds(*COUNTS[counts])
    compare(
        ["rows", "weight", "bias"],
        lambda r, w, b: grouped_linear(r, w, offsets, b, transposed=True),
        lambda r, w, b: naive.grouped_linear(r, w.transpose(1, 2), offsets, b),
        [randn(int(offsets[-1]), inputs), randn(E, inputs, outputs, seed=1), randn(E, outputs, seed=2)],
    )


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("backend", [loop, fused, native], ids=["loop", "grouped_mm", "native"])
def test_backends_agree_with_the_oracle(counts: str, backend: ModuleType) -> None:
    offsets = bounds(*COUNTS[counts])
    R, E = int(offsets[-1]), len(COUNTS[counts])
    rows, weight, bias, grad = randn(R, 8), randn(E, 12, 8, seed=1), randn(E, 12, seed=2), randn(R, 12, seed=3)
    if not backend.supported(Spec.of(rows, weight))[0]:
        assert counts == "no rows"
        return
    if R == 0:
        assert torch.equal(backend.outer(grad, rows, offsets), torch.zeros(E, 12, 8))
        assert torch.equal(backend.columns(grad, offsets), torch.zeros(E, 12))
        return
    want = naive.grouped_linear(rows, weight, offsets, bias)
    assert_close("products", backend.products(rows, weight, offsets, bias), want)
    leaves = [t.double().requires_grad_() for t in (rows, weight, bias)]
    y = naive.grouped_linear(leaves[0], leaves[1], offsets, leaves[2])
    d_rows, d_weight, d_bias = torch.autograd.grad(y, leaves, grad.double())
    assert_close("d rows", backend.transposed_products(grad, weight, offsets), d_rows)
    assert_close("d weight", backend.outer(grad, rows, offsets), d_weight)
    assert_close("d bias", backend.columns(grad, offsets), d_bias)


def test_gradcheck() -> None:
    offsets = bounds(2, 0, 3)
    inputs = [
        t.requires_grad_() for t in (randn(5, 3, dtype=torch.float64), randn(3, 2, 3).double(), randn(3, 2).double())
    ]
    torch.autograd.gradcheck(lambda r, w, b: grouped_linear(r, w, offsets, b), inputs)


@pytest.mark.usefixtures("each_grouped_backend")
@pytest.mark.parametrize("sizes", [(8, 12), (5, 3)], ids=["aligned", "odd"])
def test_starved_experts_get_exact_zeros(sizes: tuple[int, int]) -> None:
    offsets = bounds(0, 4, 0)
    weight, bias = randn(3, *sizes[::-1]).requires_grad_(), randn(3, sizes[1]).requires_grad_()
    grouped_linear(randn(4, sizes[0]), weight, offsets, bias).sum().backward()
    for grad in (weight.grad, bias.grad):
        assert grad is not None
        assert torch.equal(grad[[0, 2]], torch.zeros_like(grad[[0, 2]]))
        assert bool((grad[1] != 0).any())


@pytest.mark.usefixtures("each_grouped_backend")
@pytest.mark.parametrize("sizes", [(8, 12), (5, 3)], ids=["aligned", "odd"])
def test_rows_after_the_last_offset_are_zero(sizes: tuple[int, int]) -> None:
    rows = torch.full((6, sizes[0]), float("nan"))
    rows[:4] = randn(4, sizes[0])
    rows.requires_grad_()
    weight = randn(2, *sizes[::-1]).requires_grad_()
    y = grouped_linear(rows, weight, bounds(1, 3), randn(2, sizes[1]))
    y.sum().backward()
    assert torch.equal(y[4:], torch.zeros_like(y[4:]))
    assert rows.grad is not None
    assert torch.equal(rows.grad[4:], torch.zeros_like(rows.grad[4:]))
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())


def layouts() -> dict[str, tuple[Tensor, Tensor]]:
    rows, weight = randn(9, 8), randn(3, 12, 8, seed=1)
    shifted = torch.empty(9 * 8 + 1)[1:].view(9, 8)
    shifted.copy_(rows)
    return {
        "plain": (rows, weight),
        "transposed": (rows.t().contiguous().t(), weight.transpose(1, 2).contiguous().transpose(1, 2)),
        "a slice of odd width": (torch.cat([rows, rows[:, :1]], 1)[:, :8], weight),
        "an odd address": (shifted, weight),
        "one row for all": (rows[:1].expand(9, 8), weight),
        "one matrix for all": (rows, weight[:1].expand(3, 12, 8)),
    }


@pytest.mark.usefixtures("each_grouped_backend")
@pytest.mark.parametrize("layout", layouts())
def test_layouts(layout: str) -> None:
    rows, weight = layouts()[layout]
    offsets = bounds(4, 0, 5)
    got = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (rows, weight)]
    assert_close("y", grouped_linear(rows, weight, offsets), naive.grouped_linear(rows, weight, offsets))
    want = [t.detach().double().requires_grad_() for t in got]
    grad = randn(12, 9).t()  # not contiguous either
    grouped_linear(got[0], got[1], offsets).backward(grad)
    naive.grouped_linear(want[0], want[1], offsets).backward(grad.double())
    for name, a, b in zip(("rows", "weight"), got, want):
        assert b.grad is not None
        assert_close(name, a.grad, b.grad)


@pytest.mark.usefixtures("each_grouped_backend")
@pytest.mark.parametrize("sizes", [(64, 32), (33, 31)], ids=["aligned", "odd"])
def test_same_bits_twice(sizes: tuple[int, int]) -> None:
    offsets = bounds(100, 0, 31)
    tensors = [randn(131, sizes[0]), randn(3, *sizes[::-1]), randn(3, sizes[1])]
    twice(lambda r, w, b: grouped_linear(r, w, offsets, b), tensors)


def test_half_precision() -> None:
    offsets = bounds(9, 0, 6)
    tensors = [randn(15, 8, dtype=torch.bfloat16), randn(3, 12, 8, dtype=torch.bfloat16)]
    compare(
        ["rows", "weight"],
        lambda r, w: grouped_linear(r, w, offsets),
        lambda r, w: naive.grouped_linear(r, w, offsets),
        tensors,
        tol=5e-3,
    )


def test_autocast() -> None:
    """Products in bfloat16, gradients in the dtype of the parameters; float64 is left alone."""
    offsets = bounds(9, 0, 6)
    rows, weight, bias = randn(15, 8).requires_grad_(), randn(3, 12, 8).requires_grad_(), randn(3, 12).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(rows, weight, offsets, bias)
        assert grouped_linear(rows.double(), weight.double(), offsets).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    assert_close("y", y.float(), naive.grouped_linear(rows, weight, offsets, bias), 1e-2)
    with torch.autocast("cpu", torch.bfloat16):  # a backward pass inside autocast is no different
        y.float().square().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (rows, weight, bias))


GOOD = Spec(device="cpu", dtype=torch.float32, rows=100, inputs=64, outputs=32, experts=4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.bfloat16}, "slow on the CPU"),
        ({"inputs": 63}, "63 inputs of float32 are no multiple of 16 bytes"),
        ({"outputs": 2}, "outputs"),
        ({"outputs": 0}, "outputs"),
        ({"rows": 0}, "no rows"),
        ({"experts": 0}, "no rows"),
        ({"compiling": True}, "cannot be compiled"),
        ({"device": "mps"}, "mps"),
        ({"device": "cuda"}, "bfloat16 only"),
        ({"device": "cuda", "dtype": torch.bfloat16, "capability": (7, 5)}, "capability"),
    ],
)
def test_refusals_have_reasons(change: dict[str, object], reason: str) -> None:
    spec = dataclasses.replace(GOOD, **change)  # type: ignore[arg-type]
    able, why = fused.supported(spec)
    assert not able
    assert reason in why
    assert choose(spec) is not fused
    assert why in explain(spec)


def test_choice_and_its_explanation() -> None:
    assert choose(GOOD) is (native if native.supported(GOOD)[0] else fused)
    assert choose(dataclasses.replace(GOOD, device="cuda", dtype=torch.bfloat16, capability=(9, 0))) is fused
    half = dataclasses.replace(GOOD, dtype=torch.bfloat16)
    assert choose(half) is choose(GOOD, half) is loop
    text = explain(GOOD)
    assert text.splitlines()[0].endswith(f"float32 on cpu: {choose(GOOD).NAME}")
    assert "loop: possible" in text


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="rows"):
        grouped_linear(randn(4, 3), randn(2, 5, 4), bounds(1, 3))
    with pytest.raises(UserError, match="3 offsets"):
        grouped_linear(randn(4, 3), randn(2, 5, 3), bounds(1, 2, 1))
    with pytest.raises(UserError, match="bfloat16 and float32"):
        grouped_linear(randn(4, 3), randn(2, 5, 3).bfloat16(), bounds(1, 3))
    with pytest.raises(UserError, match="bias"):
        grouped_linear(randn(4, 3), randn(2, 5, 3), bounds(1, 3), randn(5))
