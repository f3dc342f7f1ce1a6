"""What data sets hold: plain values, one class per kind of example."""

from __future__ import annotations

import dataclasses
from typing import Generic, NamedTuple, TypeVar

from .split import shuffled

__all__ = [
    "Answer",
    "Choice",
    "DataSet",
    "Example",
    "Labelled",
    "Pair",
    "Passage",
    "Problem",
    "SpanQuestion",
    "Translation",
    "as_text",
    "prompt_and_answer",
]

T = TypeVar("T", covariant=True)


class Passage(NamedTuple):
    """A stretch of running text. domain: number in `DataSet.domains`."""

    text: str
    domain: int = 0


class Translation(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str
    domain: int = 0


class Labelled(NamedTuple):
    """A text of a class. label: number in `DataSet.labels`."""

    text: str
    label: int
    domain: int = 0


class Answer(NamedTuple):
    """A stretch of a context. start: its first character; `context[start : start + len(text)] == text`."""

    text: str
    start: int


class SpanQuestion(NamedTuple):
    """A question whose answers are stretches of its context."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    domain: int = 0


class Pair(NamedTuple):
    """Two texts, related or not."""

    a: str
    b: str
    similar: bool = True
    domain: int = 0


class Problem(NamedTuple):
    """A problem with its worked solution (which ends in the answer) and the answer alone."""

    question: str
    solution: str
    answer: str
    domain: int = 0


class Choice(NamedTuple):
    """A question with choices. answer: number of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int
    domain: int = 0


Example = Passage | Translation | Labelled | SpanQuestion | Pair | Problem | Choice


@dataclasses.dataclass(frozen=True)
class DataSet(Generic[T]):
    """A data set in its three splits, any of which may be empty. labels and domains: names, by number."""

    title: str
    train: tuple[T, ...]
    valid: tuple[T, ...] = ()
    test: tuple[T, ...] = ()
    _: dataclasses.KW_ONLY
    labels: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()

    def limited(
        self, train: int | None = None, valid: int | None = None, test: int | None = None, seed: int = 0
    ) -> DataSet[T]:
        """At most so many examples per split, drawn without replacement by the seed, in their old order."""
        parts = {}
        for name, most in (("train", train), ("valid", valid), ("test", test)):
            rows = getattr(self, name)
            if most is not None and most < len(rows):
                rows = tuple(rows[i] for i in sorted(shuffled(len(rows), seed)[:most]))
            parts[name] = rows
        return dataclasses.replace(self, **parts)


def as_text(example: Example, labels: tuple[str, ...] = ()) -> str:
    """An example as running text, for language models; ends with a line break.

    A passage is itself; a translation is source, tab, target; others are what `prompt_and_answer` gives.
    """
    if isinstance(example, Passage):
        return example.text
    if isinstance(example, Translation):
        return f"{example.source}\t{example.target}\n"
    if isinstance(example, Pair):
        return f"{example.a}\n{example.b}\n\n"
    prompt, answer = prompt_and_answer(example, labels)
    return f"{prompt}{answer}\n\n"


def prompt_and_answer(example: Example, labels: tuple[str, ...] = ()) -> tuple[str, str]:
    """What is given to a language model and what it should go on with.

    labels: names of classes, needed for `Labelled`. Passages and pairs have no answer and raise `TypeError`.
    """
    if isinstance(example, Problem):
        return f"Question: {example.question}\nAnswer: ", example.solution
    if isinstance(example, Choice):
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        options = "".join(f"{letters[i]}. {text}\n" for i, text in enumerate(example.choices))
        return f"Question: {example.question}\n{options}Answer: ", letters[example.answer]
    if isinstance(example, Labelled):
        return f"{example.text}\n-> ", labels[example.label]
    if isinstance(example, Translation):
        return f"{example.source}\t", example.target
    if isinstance(example, SpanQuestion):
        first = example.answers[0].text if example.answers else ""
        return f"{example.context.strip()}\nQuestion: {example.question}\nAnswer: ", first
    raise TypeError(f"a {type(example).__name__} has no answer")
