"""Tables of synonyms: from files, and from the company that words keep."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from moestro.core.errors import UserError
from moestro.tasks.data.augment import STOP_WORDS, Eda, augmented
from moestro.tasks.data.examples import Answer, SpanQuestion
from moestro.tasks.data.synonyms import neighbours, read_synonyms

TABLE = {"quick": ("fast", "rapid"), "dog": ("hound",)}


def test_a_table_from_a_file(tmp_path: Path) -> None:
    lines = tmp_path / "table.tsv"
    lines.write_text("# words\nQuick\tfast, Rapid,quick\n\ndog\thound\nquick\tfast\nlone\tlone\n")
    assert read_synonyms(lines) == TABLE
    rows = tmp_path / "table.json"
    rows.write_text('{"Quick": ["fast", "rapid"], "dog": ["hound"]}')
    assert read_synonyms(rows) == TABLE


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.tsv", "quick fast", "line 1: should be a word, a tab"),
        ("a.json", "[1]", "one JSON object"),
        ("a.json", '{"a": "b"}', "one JSON object"),
        ("a.json", "{", "holds no JSON"),
    ],
)
def test_other_files_are_errors(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        read_synonyms(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        read_synonyms(tmp_path / "none.tsv")


ANIMALS, COLOURS, VERBS = ("cats", "dogs", "horses"), ("red", "green", "blue"), ("sleep", "bark", "run")
TEXTS = [
    f"in the evening {animal} {verb} near the {colour} wall of the house"
    for animal, verb, colour in itertools.product(ANIMALS, VERBS, COLOURS)
]


def test_words_of_like_company_are_neighbours() -> None:
    table = neighbours(TEXTS, least_count=5, most=2, dim=8)
    for group in (ANIMALS, COLOURS, VERBS):
        for word in group:
            assert set(table[word]) == set(group) - {word}, word
    assert not set(table) & STOP_WORDS
    assert table == neighbours(TEXTS, least_count=5, most=2, dim=8)
    assert neighbours(TEXTS, least_count=5, least_similarity=1.01) == {}
    with pytest.raises(UserError, match="0 words occur 100 times"):
        neighbours(TEXTS, least_count=100)


def test_neighbours_augment() -> None:
    context = "In the evening dogs bark near the red wall."
    question = SpanQuestion("q", "Who?", context, (Answer("dogs", 15),))
    table = neighbours(TEXTS, least_count=5, most=2, dim=8)
    made = augmented(question, Eda(synonyms=0.3, copies=6), table)
    assert made
    for copy in made:
        assert copy.context[copy.answers[0].start :].startswith("dogs")
        assert copy.context != context
