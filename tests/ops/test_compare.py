"""The comparison helper refuses what is wrong, by name."""

from __future__ import annotations

import pytest
import torch

from moestro.testing.compare import assert_close, relative_error

ONES = torch.ones(10)


def test_passes() -> None:
    assert_close("x", ONES, ONES)
    assert_close("x", ONES + 1e-7, ONES.double(), 1e-6)
    assert_close("empty", torch.zeros(0), torch.zeros(0))
    assert_close("zero", torch.zeros(3), torch.zeros(3))
    assert_close("counts", torch.arange(3), torch.arange(3), dtype=True)


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        (ONES * 1.001, ONES, "wrong: relative error 0.001 over 1e-05"),
        (ONES * float("nan"), ONES, "wrong: 10 of 10 entries are not finite"),
        (ONES * float("inf"), ONES, "not finite"),
        (ONES * float("inf"), ONES * float("inf"), "not finite"),
        (torch.ones(10, 1), ONES, r"wrong: shape \[10, 1\], expected \[10\]"),
        (ONES.long(), ONES, "dtype torch.int64, expected torch.float32"),
        (ONES.long(), torch.zeros(10).long(), "wrong: 10 of 10 entries differ"),
        (None, ONES, "wrong: there is no tensor"),
        (torch.full((3,), 1e-4), torch.zeros(3), "relative error"),
    ],
)
def test_refuses(got: torch.Tensor | None, want: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_close("wrong", got, want)


def test_dtype_on_demand() -> None:
    assert_close("x", ONES, ONES.double())
    with pytest.raises(AssertionError, match="expected torch.float64"):
        assert_close("x", ONES, ONES.double(), dtype=True)


def test_error_is_relative_to_the_whole_tensor() -> None:
    want = torch.tensor([1e6, 1e-6])
    assert relative_error(want + torch.tensor([0.0, 1e-6]), want) < 1e-11
    assert relative_error(torch.full((3,), 2.0), torch.zeros(3)) == pytest.approx(12**0.5)
