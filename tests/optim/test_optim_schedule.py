"""Schedules are pure functions of the step, with the values that they promise."""

from __future__ import annotations

import itertools

import pytest

from moestro.core.errors import UserError
from moestro.optim import WSD, AdamW, Cosine


def test_cosine_warms_up_peaks_and_ends_at_the_floor():
    schedule = Cosine(warmup=10, floor=0.1)
    factors = [schedule.factor(s, 100) for s in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert factors[10] == 1.0
    assert schedule.factor(55, 100) == pytest.approx(0.1 + 0.9 * 0.5)  # half way down
    assert factors[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))


def test_wsd_is_flat_until_its_decay():
    schedule = WSD(warmup=0.1, floor=0.0, decay=0.2)
    factors = [schedule.factor(s, 50) for s in range(50)]
    assert factors[4] == 1.0
    assert set(factors[4:41]) == {1.0}
    assert factors[45] == pytest.approx(0.5)
    assert factors[49] == pytest.approx(0.1)


def test_a_stable_schedule_can_be_extended_and_a_cosine_cannot():
    wsd, cosine = WSD(warmup=5, decay=0.2), Cosine(warmup=5)
    assert [wsd.factor(s, 100) for s in range(80)] == [wsd.factor(s, 200) for s in range(80)]
    assert cosine.factor(50, 100) != cosine.factor(50, 200)


def test_one_step_trains_at_the_peak():
    assert Cosine(warmup=0.05).factor(0, 1) == 1.0
    assert WSD(warmup=0.05).factor(0, 1) > 0


@pytest.mark.parametrize(
    "bad", [lambda: Cosine(warmup=-1), lambda: WSD(decay=2.0), lambda: AdamW(lr=-1.0), lambda: AdamW(beta1=1.0)]
)
def test_impossible_values_are_refused(bad):
    with pytest.raises(UserError):
        bad()
