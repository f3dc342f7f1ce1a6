"""The rules of the comparison of dynamic routing (21), on figures made by hand."""

from __future__ import annotations

import pytest

from moestro.papers.dynamic_routing import DOMAINS, PAPER, by_difficulty, counted


def figures(hard: float, easy: float) -> dict[str, dict[str, float]]:
    bits = dict(zip(DOMAINS, (2.0, 3.0, 1.0)))
    taken = dict(zip(DOMAINS, (9.0, hard, easy)))
    return {
        "dynamic": {f"experts_{n}": v for n, v in taken.items()},
        "top-2": {f"bits_{n}": v for n, v in bits.items()},
    }


def test_21_harder_text_is_that_with_the_higher_loss_of_top_2() -> None:
    assert by_difficulty(figures(2.2, 2.0)) == pytest.approx(0.1)
    assert by_difficulty(figures(1.8, 2.0)) == pytest.approx(-0.1)


def test_21_the_published_sizes_are_counted() -> None:
    found = {c.what: c for c in counted()}
    for c in found.values():
        if c.published is not None and c.unit == "" and c.published > 1:
            assert c.ours == pytest.approx(c.published, rel=0.005)
    share = found["the same, as a share of top-2's"].ours
    assert share == pytest.approx(0.914, abs=5e-4)  # of experts alone it is 0.88


def test_21_arms_are_counted_at_the_expected_number_of_experts() -> None:
    arms = {arm.name: arm for arm in PAPER.arms(False)}
    one, two = arms["top-1"].flops(), arms["top-2"].flops()
    assert arms["dynamic"].flops() == arms["beta 0"].flops() == pytest.approx(two + 0.8 * (two - one), rel=1e-3)
