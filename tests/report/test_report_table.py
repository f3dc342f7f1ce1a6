"""The table of the sparse model and its dense twin."""

from __future__ import annotations

import json

import pytest

from moestro.report.table import Line, ModelResult, at, comparison, human


def curve(points, **fields):
    return [{"split": "valid", "step": s, "seconds": t, "bpb": v} | fields for s, t, v in points]


SPARSE = ModelResult(
    name="sparse",
    rows=[
        *curve([(10, 4.0, 3.0), (20, 8.0, 2.0), (30, 12.0, 1.8)]),
        *({"split": "train", "step": i, "tokens_per_s": v, "load_entropy": 0.9} for i, v in enumerate((90, 100, 500))),
    ],
    params=4_000_000,
    active_params=1_000_000,
    flops_per_token=2_000_000,
)
DENSE = ModelResult(
    name="dense",
    rows=[
        *curve([(10, 2.0, 3.2), (20, 4.0, 2.4)]),
        *({"split": "train", "step": i, "tokens_per_s": 200, "load_entropy": None} for i in range(3)),
    ],
    params=1_010_000,
    active_params=1_010_000,
    flops_per_token=2_020_000,
)


def lines():
    return {line.quantity: line for line in comparison(SPARSE, DENSE).lines}


def test_values_at_equal_steps_and_equal_wall_time():
    # steps: both reached 20; time: both reached 4 s
    assert lines()["validation, equal steps"].values == (2.0, 2.4)
    assert lines()["validation, equal wall time"].values == (3.0, 2.4)
    assert lines()["validation, equal steps"].best() == 0
    assert lines()["validation, equal wall time"].best() == 1  # as it came out, whoever wins
    assert comparison(SPARSE, DENSE).notes == ("equal steps: step 20", "equal wall time: 4 s")


def test_curves_are_read_in_straight_lines():
    rows = curve([(20, 2.0, 3.0), (10, 1.0, 4.0), (30, 3.0, float("nan"))])
    assert at(rows, "step", 15) == 3.5
    assert at(rows, "seconds", 2.0) == 3.0
    assert at(rows, "step", 25) is None
    assert at(rows, "step", 5) is None
    assert at(rows[:1], "step", 20) == 3.0
    assert at([], "step", 1) is None


def test_the_other_lines():
    found = lines()
    assert found["speed"].values == (100, 200)
    assert found["speed"].best() == 1
    assert found["load entropy"].values == (0.9, None)
    assert found["load entropy"].shown() == ("0.900", "–")
    assert found["load entropy"].difference() == ""
    assert found["parameters"].shown() == ("4 M", "1.01 M")
    assert found["parameters"].best() is None
    assert found["compute"].difference() == "0.990 ×"
    assert found["validation, equal steps"].difference() == "−0.4000"


def test_a_model_without_evaluations_leaves_dashes():
    table = comparison(ModelResult(name="a", rows=[]), DENSE)
    assert table.lines[0].values == (None, None)
    assert table.lines[0].shown() == ("–", "–")
    assert table.notes == ()


def test_the_table_as_json():
    made = json.loads(json.dumps(comparison(SPARSE, DENSE).to_dict()))
    assert made["validation, equal steps"] == {"unit": "bits per byte", "sparse": 2.0, "dense": 2.4}
    assert made["load entropy"]["dense"] is None


def test_nobody_is_best_in_a_tie_or_alone():
    assert Line(quantity="x", values=(1.0, 1.0), better="lower").best() is None
    assert Line(quantity="x", values=(1.0, None), better="lower").best() is None
    assert Line(quantity="x", values=(2.0, 3.0, 1.0), better="lower").best() == 2
    assert Line(quantity="x", values=(2.0, 3.0)).best() is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12.345, "12.35"), (1234, "1.234 k"), (46_702_792_704, "46.7 G"), (1e12, "1 T"), (999_999, "1000 k")],
)
def test_human_numbers(value, text):
    assert human(value) == text
