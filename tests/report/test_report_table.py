"""The final table as plain values."""

from __future__ import annotations

import pytest

from moestro.report.table import Line, human


def test_values_as_text():
    assert Line(quantity="x", values=(2.0, 2.45678, None, float("nan"))).shown() == ("2.0000", "2.4568", "–", "–")
    assert Line(quantity="x", values=(4e6, 1.01e6), digits=None).shown() == ("4 M", "1.01 M")
    assert Line(quantity="x", values=(99.6,), digits=0).shown() == ("100",)


def test_difference_is_first_minus_second_or_a_ratio():
    assert Line(quantity="x", values=(2.0, 2.4)).difference() == "−0.4000"
    assert Line(quantity="x", values=(2.4, 2.0)).difference() == "+0.4000"
    assert Line(quantity="x", values=(2e6, 2.02e6), digits=None).difference() == "0.990 ×"
    assert Line(quantity="x", values=(2e6, 0.0), digits=None).difference() == ""
    assert Line(quantity="x", values=(2.0, None)).difference() == ""
    assert Line(quantity="x", values=(1.0, 2.0, 3.0)).difference() == ""


def test_the_best_is_what_the_quantity_calls_better():
    assert Line(quantity="x", values=(2.0, 3.0, 1.0), better="lower").best() == 2
    assert Line(quantity="x", values=(2.0, 3.0, None), better="higher").best() == 1
    assert Line(quantity="x", values=(float("nan"), 3.0, 4.0), better="lower").best() == 1
    assert Line(quantity="x", values=(1.0, 1.0), better="lower").best() is None
    assert Line(quantity="x", values=(1.0, None), better="lower").best() is None
    assert Line(quantity="x", values=(2.0, 3.0)).best() is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12.345, "12.35"), (1234, "1.234 k"), (46_702_792_704, "46.7 G"), (1e12, "1 T"), (999_999, "1000 k")],
)
def test_human_numbers(value, text):
    assert human(value) == text
