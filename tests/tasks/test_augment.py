"""Easy data augmentation, back-translation and corruption: answers and their places survive."""

from __future__ import annotations

import pytest

from moestro.core.errors import UserError
from moestro.tasks.data.augment import STOP_WORDS, Eda, augmented, back_translated, corrupted
from moestro.tasks.data.examples import Answer, SpanQuestion

CONTEXT = "The quick brown fox (aged 3) jumps over the lazy dog, and the brown dog sleeps near a quick river today."
TABLE = {
    "quick": ("fast", "rapid"),
    "brown": ("tan",),
    "sleeps": ("rests", "naps"),
    "lazy": ("idle",),
    "dog": ("hound",),
}


def asked(*texts: str, context: str = CONTEXT) -> SpanQuestion:
    return SpanQuestion("q1", "What?", context, tuple(Answer(t, context.index(t)) for t in texts))


def sound(question: SpanQuestion, *texts: str) -> None:
    assert tuple(a.text for a in question.answers) == texts
    for answer in question.answers:
        assert question.context[answer.start : answer.start + len(answer.text)] == answer.text


ALL = Eda(synonyms=0.3, insertions=0.2, swaps=0.2, deletions=0.3, copies=12)


@pytest.mark.parametrize(
    "texts", [("lazy dog",), ("lazy dog", "dog"), ("fox (aged 3", "3) jumps", "river"), ("The", "day.")]
)
def test_answers_are_never_altered(texts: tuple[str, ...]) -> None:
    question = asked(*texts)
    made = [copy for seed in range(20) for copy in augmented(question, ALL, TABLE, seed)]
    assert len(made) > 100
    for copy in made:
        sound(copy, *texts)
        assert copy.context != CONTEXT
        assert "  " not in copy.context
        assert copy.question == "What?"
    assert (
        augmented(question, ALL, TABLE, 3) == augmented(question, ALL, TABLE, 3) != augmented(question, ALL, TABLE, 4)
    )
    assert len({copy.id for copy in augmented(question, ALL, TABLE)} | {"q1"}) == 1 + len(
        augmented(question, ALL, TABLE)
    )


def test_synonyms_come_from_the_table() -> None:
    question = asked("lazy dog")
    for seed in range(20):
        for copy in augmented(question, Eda(synonyms=0.1, copies=3), TABLE, seed):
            old, new = CONTEXT.split(), copy.context.split()
            changed = [(a.strip(".,"), b.strip(".,")) for a, b in zip(old, new, strict=True) if a != b]
            assert 1 <= len(changed) <= 2  # int(0.1 * 20 words), the answer being one
            assert all(b in TABLE[a] for a, b in changed)
    upper = asked("x", context="Quick, x")
    assert {c.context for c in augmented(upper, Eda(synonyms=1.0, copies=9), TABLE)} == {"Fast, x", "Rapid, x"}


def test_synonyms_without_a_table_are_skipped() -> None:
    assert augmented(asked("fox"), Eda(), None) == []
    assert augmented(asked("fox"), Eda(insertions=0.5), {}) == []
    assert augmented(asked("fox"), Eda(), {"zebra": ("horse",)}) == []
    assert augmented(asked("fox"), Eda(deletions=0.5), None)


def test_stop_words_stay_and_swaps_keep_all_words() -> None:
    for copy in augmented(asked("fox"), Eda(synonyms=0, deletions=1.0, copies=1)):
        assert copy.context == "The fox over the and the a"
    for copy in augmented(asked("lazy dog"), Eda(synonyms=0, swaps=0.5, copies=5)):
        assert sorted(copy.context.split()) == sorted(CONTEXT.split())
    assert {"the", "and"} <= STOP_WORDS


def test_insertions_add_words() -> None:
    made = augmented(asked("lazy dog"), Eda(synonyms=0, insertions=0.2, copies=5), TABLE)
    assert made
    for copy in made:
        assert len(copy.context.split()) == len(CONTEXT.split()) + 4  # int(0.2 * 20), the answer being one


def test_the_number_of_copies() -> None:
    assert len(augmented(asked("fox"), Eda(synonyms=0, swaps=0.3, deletions=0.3, copies=8))) == 8
    assert augmented(asked("fox"), Eda(synonyms=0, swaps=0.3, copies=0)) == []
    with pytest.raises(UserError, match="between 0 and 1"):
        augmented(asked("fox"), Eda(swaps=2))


def test_the_released_augmentation() -> None:
    fox = asked("Fox (aged 3", context="The Fox (aged 3) naps. A fox, quick!")
    ends = set()
    for seed in range(9):
        made = augmented(fox, Eda(copies=2), TABLE, seed, as_released=True)
        assert made[-1].context == "the fox aged 3 naps a fox quick"
        sound(made[-1], "fox aged 3")
        ends |= {copy.context.split()[-1] for copy in made[:-1]}
    assert ends == {"fast", "rapid"}
    # an answer whose words are pulled apart is not found again, and the copy is dropped
    swapped = augmented(asked("lazy dog"), Eda(synonyms=0, swaps=1.0, copies=4), as_released=True)
    assert len(swapped) < 5
    for copy in swapped:
        sound(copy, "lazy dog")
    # the first string like the answer, wherever it is
    inside = asked("cat", context="Concatenate: The Cat and a cat")
    assert augmented(inside, Eda(copies=0), as_released=True)[-1].answers == (Answer("cat", 3),)


def test_an_identity_translator_gives_back_the_context() -> None:
    context = "  One two three four five six, seven\n  lazy dog eight nine ten eleven twelve thirteen .\n"
    question = asked("lazy dog", context=context)
    same = back_translated(question, lambda text: text)
    assert same.context == context
    sound(same, "lazy dog")
    assert same.id == "q1/back"


def test_translations_go_round_the_answers() -> None:
    heard: list[str] = []

    def translate(text: str) -> str:
        heard.append(text)
        return f" {text.upper()}!! "

    question = asked("lazy dog", "river")
    made = back_translated(question, translate)
    assert heard == ["The quick brown fox (aged 3) jumps over the", ", and the brown dog sleeps near a quick"]
    assert made.context == (
        "THE QUICK BROWN FOX (AGED 3) JUMPS OVER THE!! lazy dog, AND THE BROWN DOG SLEEPS NEAR A QUICK!! river today."
    )
    sound(made, "lazy dog", "river")
    assert back_translated(question, translate, least=99).context == CONTEXT
    none = question._replace(answers=())
    assert back_translated(none, str.upper).context == CONTEXT.upper()


def test_corruption() -> None:
    text = " ".join(f"word{i}" for i in range(20))
    assert corrupted(text, 0.0) == text
    assert corrupted(text, 0.2) == corrupted(text, 0.2) != corrupted(text, 0.2, seed=1)
    assert len(corrupted(text, 0.2, kinds=("drop",)).split()) == 16
    assert sorted(corrupted(text, 0.3, kinds=("swap",)).split()) == sorted(text.split())
    wrong = [a for a, b in zip(corrupted(text, 0.2, kinds=("misspell",)).split(), text.split(), strict=True) if a != b]
    assert len(wrong) == 4
    assert corrupted("ab", 1.0, kinds=("misspell",)) == "ba"
    assert corrupted("aa", 1.0, kinds=("misspell",)) == "aaa"
    assert corrupted("one", 1.0, kinds=("drop",)) != ""
    assert corrupted("", 0.5) == ""
    with pytest.raises(UserError, match="share between 0 and 1"):
        corrupted(text, 1.5)
    with pytest.raises(UserError, match="kinds of"):
        corrupted(text, 0.5, kinds=("burn",))
