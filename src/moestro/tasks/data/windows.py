"""Windows for extractive question answering: [cls] question [sep] context [sep], the context cut with overlap."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ...core.errors import UserError
from .batches import SpanBatch, padded, whole
from .examples import SpanQuestion
from .vocabulary import Placed, TextVocabulary

__all__ = ["SpanWindows", "Window", "make_windows"]


@dataclasses.dataclass(frozen=True)
class Window:
    """One window of a question. Per token: ids, matched (0 or 1), places (first and last character in the context,
    (-1, -1) outside of it). start, end: first and last token of the first answer that is wholly inside, else 0, 0.
    """

    ids: list[int]
    matched: list[int]
    places: list[tuple[int, int]]
    start: int
    end: int
    example: int
    domain: int


def make_windows(
    questions: Sequence[SpanQuestion],
    vocabulary: TextVocabulary,
    length: int,
    stride: int,
    answered: bool = False,
) -> list[Window]:
    """All windows of all questions, at most `length` tokens each; neighbouring windows of a context share `stride`.

    The question is cut to half of the window. answered: only windows with an answer (for training).
    `Window.example` is the question's number in `questions`.
    """
    if length < 8 or not 0 <= stride < length // 2 - 2:
        raise UserError(f"windows of {length} tokens with {stride} shared: need length >= 8 and stride < length/2 - 2")
    found: list[Window] = []
    known: dict[str, tuple[Placed, set[str]]] = {}
    for number, question in enumerate(questions):
        asked = vocabulary.placed(question.question)
        limit = length // 2 - 2
        asked_ids, asked_places = asked.ids[:limit], asked.places[:limit]
        if question.context not in known:
            context = vocabulary.placed(question.context)
            known[question.context] = context, {question.context[a:b].lower() for a, b in context.places}
        context, there = known[question.context]
        said = {question.question[a:b].lower() for a, b in asked_places}
        in_context = [_matches(question.question[a:b], there) for a, b in asked_places]
        in_question = [_matches(question.context[a:b], said) for a, b in context.places]
        room = length - len(asked_ids) - 3
        first = 0
        while True:
            part = slice(first, first + room)
            places = context.places[part]
            before = len(asked_ids) + 2
            start, end = _answer(question, places, before)
            if end or not answered:
                found.append(
                    Window(
                        [vocabulary.cls, *asked_ids, vocabulary.sep, *context.ids[part], vocabulary.sep],
                        [0, *in_context, 0, *in_question[part], 0],
                        [(-1, -1)] * before + places + [(-1, -1)],
                        start,
                        end,
                        number,
                        question.domain,
                    )
                )
            if first + room >= len(context.ids):
                break
            first += room - stride
    return found


class SpanWindows:
    """`SpanBatch` of windows: give `make_windows(...)` as the examples of `ExampleBatches`."""

    def __init__(self, vocabulary: TextVocabulary) -> None:
        self.pad_id = vocabulary.pad

    def encode(self, example: Window) -> Window:
        return example

    def pad(self, encoded: Sequence[Window], rows: slice) -> SpanBatch:
        tokens, valid, units = padded([w.ids for w in encoded], self.pad_id, rows)
        matched, _, _ = padded([w.matched for w in encoded], 0, rows)
        inside, _, _ = padded([[int(end > 0) for _, end in w.places] for w in encoded], 0, rows)
        chosen = encoded[rows]
        return SpanBatch(
            tokens=tokens,
            matched=matched,
            valid=valid,
            context=inside.bool(),
            start=whole([w.start for w in chosen]),
            end=whole([w.end for w in chosen]),
            domain=whole([w.domain for w in chosen]),
            example=whole([w.example for w in chosen]),
            unit_id=units,
        )


def _matches(said: str, others: set[str]) -> int:
    said = said.lower()
    return int(said in others and any(char.isalnum() for char in said))


def _answer(question: SpanQuestion, places: Sequence[tuple[int, int]], before: int) -> tuple[int, int]:
    """First and last token (counted from the window's) of the first answer that the places cover, else (0, 0)."""
    if not places:
        return 0, 0
    starts, ends = np.asarray(places).T
    for answer in question.answers:
        low, high = answer.start, answer.start + len(answer.text)
        touched = np.flatnonzero((ends > low) & (starts < high) & (ends > starts))
        if (
            len(touched)
            and starts[touched[0]] <= low + _blanks(answer.text)
            and ends[touched[-1]] >= len(answer.text.rstrip()) + low
        ):
            return int(touched[0]) + before, int(touched[-1]) + before
    return 0, 0


def _blanks(text: str) -> int:
    return len(text) - len(text.lstrip())
