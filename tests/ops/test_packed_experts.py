"""Experts with packed weights against the oracle on the numbers that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.ops.expert_mlp import ACTIVATIONS
from moestro.ops.expert_mlp import naive as fp32
from moestro.ops.packed import (
    KINDS,
    Kind,
    Packed,
    kernels,
    naive,
    op,
    pack,
    packed_few,
    packed_linear,
    packed_rows,
    unpack,
)
from moestro.testing.compare import assert_close, relative_error
from ops.kernel_cases import levels, loader
from ops.native_cases import CAN, compiles
from ops.ops_cases import bounds, rand, randn

SIZES = [(7, 5), (33, 31), (64, 96), (130, 70), (600, 40)]
TABLE = torch.tensor([[0, 4, -1], [1, 1, 5], [2, 3, 0], [-1, 7, 9]])  # repeated, absent, virtual; the last of nobody
E = 5


def use(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = loader(level)
    monkeypatch.setattr(kernels, "native", made)
    monkeypatch.setattr(op, "fast", lambda x: made.load() if x.dtype == torch.float32 else None)


@pytest.fixture(params=["none", *levels()] if CAN else ["none"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Without the kernels, and with those for either instruction set."""
    use(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=levels())
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels only."""
    use(request.param, monkeypatch)


def problem(kind: Kind, D: int, F: int, gated: bool = True) -> tuple[Tensor, Tensor, Packed, Packed]:
    """x, weight, first, down for `TABLE`."""
    first, down = randn(E, (2 if gated else 1) * F, D) / D**0.5, randn(E, D, F, seed=1) / F**0.5
    T, K = TABLE.shape
    return randn(T, D, seed=2), rand(T, K, seed=3), pack(first, kind), pack(down, kind)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("size", SIZES)
def test_few(level: str, kind: Kind, size: tuple[int, int]) -> None:
    x, weight, first, down = problem(kind, *size)
    got = packed_few(x, TABLE, weight, first, down, "silu")
    assert_close("y", got, naive.packed_few(x, TABLE, weight, first, down, "silu"), 1e-6)
    assert not got[3].any()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
def test_few_activations(level: str, kind: Kind, activation: str, gated: bool) -> None:
    x, weight, first, down = problem(kind, 40, 33, gated)
    got = packed_few(x, TABLE, weight, first, down, activation, gated)
    assert_close("y", got, naive.packed_few(x, TABLE, weight, first, down, activation, gated), 1e-6)


@compiles
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("size", SIZES)
def test_threads_and_company_change_nothing(compiled: None, kind: Kind, size: tuple[int, int]) -> None:
    x, weight, first, down = problem(kind, *size)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(packed_few(x, TABLE, weight, first, down))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    for t in range(len(TABLE)):
        s = slice(t, t + 1)
        assert torch.equal(packed_few(x[s], TABLE[s], weight[s], first, down), made[0][s])


@pytest.mark.parametrize("kind", list(KINDS))
def test_strided_inputs(level: str, kind: Kind) -> None:
    x, weight, first, down = problem(kind, 33, 31)

    def strided(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT

    def odd(p: Packed) -> Packed:
        return Packed(p.kind, strided(p.data), None if p.scale is None else strided(p.scale), p.inputs)

    want = naive.packed_few(x, TABLE, weight, first, down, "silu")
    assert_close("x, table", packed_few(strided(x), strided(TABLE), strided(weight), first, down), want, 1e-6)
    assert_close("weights", packed_few(x, TABLE, weight, odd(first), odd(down)), want, 1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("counts", [(3, 0, 5, 0, 1), (0, 0, 0, 0, 0), (0, 0, 40, 0, 0)])
def test_rows(level: str, kind: Kind, counts: tuple[int, ...]) -> None:
    _, _, first, down = problem(kind, 33, 31)
    offsets = bounds(*counts)
    rows = randn(sum(counts) + 2, 33, seed=5)  # two rows that belong to nobody
    got = packed_rows(rows, offsets, first, down, "gelu")
    want = fp32.gated_mlp(rows[:-2].double(), unpack(first).double(), unpack(down).double(), offsets, "gelu")
    assert_close("rows", got[:-2], want, 1e-6)
    assert not got[-2:].any()


@pytest.mark.parametrize("kind", list(KINDS))
def test_rows_of_plain_experts_with_biases(level: str, kind: Kind) -> None:
    _, _, first, down = problem(kind, 33, 31, gated=False)
    offsets, rows = bounds(2, 0, 3, 1, 0), randn(6, 33, seed=5)
    b1, b2 = randn(E, 31, seed=6), randn(E, 33, seed=7)
    got = packed_rows(rows, offsets, first, down, "gelu_tanh", False, b1, b2)
    wide = [t.double() for t in (rows, unpack(first), unpack(down))]
    want = fp32.mlp(*wide, offsets, "gelu_tanh", b1.double(), b2.double())
    assert_close("rows", got, want, 1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 33, 31), (op.FEW, 64, 40), (op.FEW + 1, 40, 9), (0, 7, 5)])
def test_linear(level: str, kind: Kind, shape: tuple[int, int, int]) -> None:
    T, I, O = shape
    x, weight = randn(T, I), pack(randn(O, I, seed=1), kind)
    got = packed_linear(x[None], weight)
    assert_close("y", got, x[None].double() @ unpack(weight).double().T, 1e-6)


# What rounding can do: a product is off by the root mean square of the weights' errors, as the errors are independent.
# int4 loses a few times 1 / 16 of a block's largest weight, which is about 2.5 of its root mean square.
@pytest.mark.parametrize(("kind", "least", "most"), [("bf16", 1e-3, 4e-3), ("int8", 4e-3, 1.2e-2), ("int4", 0.05, 0.2)])
def test_the_error_against_fp32(level: str, kind: Kind, least: float, most: float) -> None:
    first, down = randn(E, 256, 128) / 128**0.5, randn(E, 128, 128, seed=1) / 128**0.5
    x, weight = randn(4, 128, seed=2), rand(4, 3, seed=3)
    got = packed_few(x, TABLE, weight, pack(first, kind), pack(down, kind))
    error = relative_error(got, naive.few(x, TABLE, weight, first, down, "silu"))
    assert least < error < most


def test_under_compile() -> None:
    x, weight, first, down = problem("int4", 64, 32)

    def both(x: Tensor, weight: Tensor) -> Tensor:
        return packed_linear(packed_few(x, TABLE, weight, first, down), first[0])

    want = both(x, weight)
    assert torch.equal(torch.compile(both, fullgraph=True, backend="eager")(x, weight), want)


def test_fake_shapes() -> None:
    x, weight, first, down = problem("int8", 33, 31)
    args = ("int8", first.data, first.scale, down.data, down.scale, 31, "silu", True)
    torch.library.opcheck(op._FEW, (x, TABLE, weight, *args))
    torch.library.opcheck(op._ROWS, (x, bounds(1, 0, 3, 0, 0), *args, None, None, False))
    torch.library.opcheck(op._LINEAR, (x, "int8", first.data[0], first.scale[0]))  # type: ignore[index]


def test_refused() -> None:
    x, weight, first, down = problem("int4", 33, 31)
    with pytest.raises(UserError, match="no gradient"):
        packed_few(x.clone().requires_grad_(), TABLE, weight, first, down)
    with pytest.raises(UserError, match="do not fit"):
        packed_few(x[:, :-1], TABLE, weight, first, down)
    with pytest.raises(UserError, match="do not fit"):
        packed_few(x, TABLE, weight, first, down, gated=False)
    with pytest.raises(UserError, match=r"must both be \[T, K\]"):
        packed_few(x, TABLE[:2], weight, first, down)
    with pytest.raises(UserError, match="one offset more"):
        packed_rows(x, bounds(1, 2), first, down)
    with pytest.raises(UserError, match="no biases"):
        packed_rows(x, bounds(1, 1, 1, 1, 0), first, down, "silu", True, randn(E, 31))
    with pytest.raises(UserError, match="unknown activation"):
        packed_few(x, TABLE, weight, first, down, "tanh")
    with pytest.raises(UserError, match="does not fit"):
        packed_linear(x, first)
