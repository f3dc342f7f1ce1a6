"""Experts of a few units in C against the oracle: every activation, odd sizes, ids that add nothing, both widths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.ops.expert_mlp import ACTIVATIONS, few_native, gated_few
from moestro.ops.expert_mlp.few import _by_choice
from moestro.ops.expert_mlp.few_native import few
from moestro.ops.packed.naive import few as oracle
from moestro.testing.compare import assert_close
from ops.kernel_cases import levels, loader
from ops.native_cases import compiles
from ops.ops_cases import rand, randn

SIZES = [(1, 1), (7, 5), (33, 31), (64, 16), (130, 70)]
TABLE = torch.tensor([[0, 4, -1], [1, 1, 5], [2, 3, 0], [-1, 7, 9]])  # repeated, absent, virtual; the last of nobody


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(few_native, "native", loader(request.param))
    return request.param


def problem(D: int, F: int, E: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, gate_up, down for `TABLE`."""
    T, K = TABLE.shape
    gate_up, down = randn(E, 2 * F, D, seed=seed) / D**0.5, randn(E, D, F, seed=seed + 1) / F**0.5
    return randn(T, D, seed=seed + 2), rand(T, K, seed=seed + 3), gate_up, down


@compiles
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_against_the_oracle(level: str, size: tuple[int, int], activation: str) -> None:
    x, weight, gate_up, down = problem(*size)
    want = oracle(x, TABLE, weight, gate_up, down, activation)
    got = few(x, TABLE, weight, gate_up, down, activation)
    assert_close("compiled", got, want, 1e-6)
    assert_close("torch", _by_choice(x, TABLE, weight, gate_up, down, activation), want, 1e-6)
    assert_close("op", gated_few(x, TABLE, weight, gate_up, down, activation), want, 1e-6)
    with torch.no_grad():  # past the op
        assert_close("function", gated_few(x, TABLE, weight, gate_up, down, activation), want, 1e-6)
    assert got is not None
    assert not got[3].any()


@compiles
@pytest.mark.parametrize("size", SIZES)
def test_threads_change_nothing(level: str, size: tuple[int, int]) -> None:
    x, weight, gate_up, down = problem(*size)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(few(x, TABLE, weight, gate_up, down, "silu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@compiles
def test_a_unit_does_not_depend_on_the_others(level: str) -> None:
    x, weight, gate_up, down = problem(33, 31)
    together = few(x, TABLE, weight, gate_up, down, "gelu")
    assert together is not None
    for t in range(len(TABLE)):
        s = slice(t, t + 1)
        assert torch.equal(few(x[s], TABLE[s], weight[s], gate_up, down, "gelu"), together[s])


@compiles
def test_strided_inputs(level: str) -> None:
    x, weight, gate_up, down = problem(33, 31)
    want = few(x, TABLE, weight, gate_up, down, "silu")
    assert want is not None

    def strided(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT

    odd = (strided(x), strided(TABLE), strided(weight), strided(gate_up), strided(down))
    assert not any(t.is_contiguous() for t in odd)
    assert torch.equal(few(*odd, "silu"), want)
    assert torch.equal(few(x, TABLE.int(), weight.double(), gate_up, down, "silu"), want)


@compiles
def test_nothing_to_do(level: str) -> None:
    x, weight, gate_up, down = problem(7, 5)
    none = few(x[:0], TABLE[:0], weight[:0], gate_up, down, "silu")
    assert none is not None
    assert none.shape == (0, 7)
    nobody = few(x, torch.full_like(TABLE, -1), weight, gate_up, down, "silu")
    assert nobody is not None
    assert not nobody.any()


@compiles
def test_what_is_not_for_it(level: str) -> None:
    x, weight, gate_up, down = problem(7, 5)
    assert few(x.double(), TABLE, weight, gate_up.double(), down.double(), "silu") is None
    for wrong in ((x[:2], TABLE, weight), (x, TABLE[:, :2], weight), (x[:, :5], TABLE, weight)):
        with pytest.raises(UserError, match="do not fit"):
            gated_few(*wrong, gate_up, down)
        with torch.no_grad(), pytest.raises(UserError, match="do not fit"):
            gated_few(*wrong, gate_up, down)


@compiles
def test_what_is_no_number_stays_in_its_unit(level: str) -> None:
    x, weight, gate_up, down = problem(33, 31)
    clean = few(x, TABLE, weight, gate_up, down, "silu")
    x[1, 3] = float("nan")
    got = few(x, TABLE, weight, gate_up, down, "silu")
    assert clean is not None
    assert got is not None
    assert torch.isnan(got[1]).all()
    assert torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])
