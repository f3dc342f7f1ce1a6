"""The chi-square test by hand, and which expert met which label."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moestro.core.errors import UserError
from moestro.core.plan import Plan
from moestro.core.trail import Key, Record, Trail
from moestro.trace.independence import independence, upper_gamma, usage_by_label


def test_chi_square_by_hand() -> None:
    # expected 12 18 / 28 42, every cell off by 2
    found = independence([[10, 20], [30, 40]])
    value = 4 / 12 + 4 / 18 + 4 / 28 + 4 / 42
    assert found.chi_square == pytest.approx(value, rel=1e-12)
    assert found.degrees == 1
    assert found.cramers_v == pytest.approx(math.sqrt(value / 100), rel=1e-12)
    assert found.p == pytest.approx(math.erfc(math.sqrt(value / 2)), rel=1e-12)


def test_independent_and_decided() -> None:
    same = independence([[5, 10, 15], [10, 20, 30]])
    assert same == pytest.approx((0.0, 2, 1.0, 0.0), abs=1e-12)
    decided = independence([[40, 0, 0], [0, 40, 0], [0, 0, 40]])
    assert decided[:2] == pytest.approx((240.0, 4))
    assert decided.cramers_v == pytest.approx(1.0)
    assert 0 < decided.p < 1e-49


def test_empty_rows_and_columns_do_not_count() -> None:
    assert independence([[10, 0, 20], [0, 0, 0], [30, 0, 40]]) == independence([[10, 20], [30, 40]])
    for bad in ([[1, 2]], [[1, 0], [2, 0]], [1, 2], [[1, -1], [1, 1]]):
        with pytest.raises(UserError, match="independence"):
            independence(bad)


@pytest.mark.parametrize("x", [1e-3, 0.5, 2.0, 3.0, 10.0, 80.0])
def test_the_tail_of_chi_square(x: float) -> None:
    """Closed forms: one, two and four degrees; and Q(a + 1, x) = Q(a, x) + x^a e^-x / gamma(a + 1)."""
    assert upper_gamma(0.5, x / 2) == pytest.approx(math.erfc(math.sqrt(x / 2)), rel=1e-10)
    assert upper_gamma(1.0, x / 2) == pytest.approx(math.exp(-x / 2), rel=1e-10)
    assert upper_gamma(2.0, x / 2) == pytest.approx(math.exp(-x / 2) * (1 + x / 2), rel=1e-10)
    for a in (0.5, 4.5, 30.0):
        step = math.exp(a * math.log(x) - x - math.lgamma(a + 1))
        assert upper_gamma(a + 1, x) == pytest.approx(upper_gamma(a, x) + step, rel=1e-9)
    assert upper_gamma(1.5, 0.0) == 1.0


def test_usage_by_label() -> None:
    expert = torch.tensor([[0, 1], [2, 0], [1, -1], [2, 1]])
    plan = Plan(expert=expert, weight=torch.ones(4, 2), num_experts=3, valid=torch.tensor([True, True, True, False]))
    trail = Trail({Key("top", 0): Record(plan=plan), Key("top", 1): Record(plan=plan)})
    found = usage_by_label(trail, [0, 1, 1, 1], 2)
    assert found.keys() == {"top"}
    assert np.array_equal(found["top"], [[1, 1, 0], [1, 1, 1]])
