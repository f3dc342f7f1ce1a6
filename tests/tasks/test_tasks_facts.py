"""Questions with choices as facts to be recited (39)."""

from __future__ import annotations

from moestro.tasks.data.examples import Choice
from moestro.tasks.probes import Example, facts_of


def test_39_facts_are_right_answers_in_words() -> None:
    questions = [
        Choice("Which is a gas?", ("iron", " air "), 1),
        Choice("Who judges?", ("a judge", "a baker"), 0),
        Choice("Which is a gas?", ("gold", "helium"), 1),  # asked before
        Choice("Nothing?", ("", "something"), 0),
        Choice("x" * 30, ("y", "z"), 0),
    ]
    found = facts_of(questions, longest=30)
    assert found == [
        Example("Question: Which is a gas?\nAnswer: ", "air"),
        ("Question: Who judges?\nAnswer: ", "a judge"),
    ]
    assert facts_of(questions, longest=31)[-1] == ("Question: " + "x" * 30 + "\nAnswer: ", "y")
