"""How examples of each kind become batches: tokens, special tokens, truncation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...core.errors import UserError
from .batches import AnswerBatch, LabelBatch, PairBatch, TranslationBatch, padded, whole
from .examples import Example, Labelled, Pair, Translation, prompt_and_answer
from .split import content_number
from .vocabulary import TextVocabulary

__all__ = ["AnswerTexts", "LabelTexts", "PairedTexts", "TranslatedTexts"]


class LabelTexts:
    """`LabelBatch`: [cls] text, cut to `length` tokens."""

    def __init__(self, vocabulary: TextVocabulary, length: int) -> None:
        _at_least(2, length)
        self.vocabulary, self.length = vocabulary, length

    def encode(self, example: Labelled) -> tuple[list[int], int, int]:
        ids = [self.vocabulary.cls, *self.vocabulary.encode(example.text)][: self.length]
        return ids, example.label, example.domain

    def pad(self, encoded: Sequence[tuple[list[int], int, int]], rows: slice) -> LabelBatch:
        tokens, valid, units = padded([e[0] for e in encoded], self.vocabulary.pad, rows)
        chosen = encoded[rows]
        return LabelBatch(
            tokens=tokens,
            valid=valid,
            labels=whole([e[1] for e in chosen]),
            domain=whole([e[2] for e in chosen]),
            unit_id=units,
        )


class TranslatedTexts:
    """`TranslationBatch`: source ids and eos; bos and target ids; target ids and eos. Cut to `length` tokens each."""

    def __init__(self, vocabulary: TextVocabulary, length: int) -> None:
        _at_least(2, length)
        self.vocabulary, self.length = vocabulary, length

    def encode(self, example: Translation) -> tuple[list[int], list[int], int]:
        most, v = self.length - 1, self.vocabulary
        return [*v.encode(example.source)[:most], v.eos], v.encode(example.target)[:most], example.domain

    def pad(self, encoded: Sequence[tuple[list[int], list[int], int]], rows: slice) -> TranslationBatch:
        v = self.vocabulary
        source, source_valid, source_units = padded([e[0] for e in encoded], v.pad, rows)
        tokens, valid, units = padded([[v.bos, *e[1]] for e in encoded], v.pad, rows)
        targets, _, _ = padded([[*e[1], v.eos] for e in encoded], -1, rows)
        return TranslationBatch(
            source=source,
            source_valid=source_valid,
            source_unit_id=source_units,
            tokens=tokens,
            targets=targets,
            valid=valid,
            domain=whole([e[2] for e in encoded[rows]]),
            unit_id=units,
        )


class PairedTexts:
    """`PairBatch`: [cls] text, cut to `length` tokens, for both texts.

    domain_tokens: names of special tokens of the vocabulary by domain, which take the place of cls; () = cls.
    swap: the two texts change places in half of the pairs, chosen by their content (the same in every epoch).
    """

    def __init__(
        self, vocabulary: TextVocabulary, length: int, domain_tokens: Sequence[str] = (), swap: bool = False
    ) -> None:
        _at_least(2, length)
        self.vocabulary, self.length, self.swap = vocabulary, length, swap
        self.first = [vocabulary.special(name) for name in domain_tokens]

    def encode(self, example: Pair) -> tuple[list[int], list[int], bool, int]:
        if self.first and not 0 <= example.domain < len(self.first):
            raise UserError(
                f"a pair of domain {example.domain}, but there are domain tokens for {len(self.first)} domains"
            )
        first = self.first[example.domain] if self.first else self.vocabulary.cls
        a, b = ([first, *self.vocabulary.encode(text)][: self.length] for text in (example.a, example.b))
        if self.swap and content_number(f"{example.a}\0{example.b}") % 2:
            a, b = b, a
        return a, b, example.similar, example.domain

    def pad(self, encoded: Sequence[tuple[list[int], list[int], bool, int]], rows: slice) -> PairBatch:
        pad = self.vocabulary.pad
        a, a_valid, a_units = padded([e[0] for e in encoded], pad, rows)
        b, b_valid, b_units = padded([e[1] for e in encoded], pad, rows)
        return PairBatch(
            a=a,
            a_valid=a_valid,
            a_unit_id=a_units,
            b=b,
            b_valid=b_valid,
            b_unit_id=b_units + len(encoded) * a.shape[1],
            similar=torch.tensor([e[2] for e in encoded[rows]], dtype=torch.bool),
            domain=whole([e[3] for e in encoded[rows]]),
        )


class _Answered(NamedTuple):
    prompt: list[int]
    answer: list[int]
    bytes: int
    domain: int


class AnswerTexts:
    """`AnswerBatch`: bos, prompt and answer, and eos; only the answer (and eos) counts.

    Prompt and answer are encoded apart, so that the border is where it should be. Too long an example loses the front
    of its prompt; an answer that alone is longer than `length` is cut. few_shot: text in front of every prompt.
    eos: the end counts as a token of the answer, of no bytes.
    """

    def __init__(
        self,
        vocabulary: TextVocabulary,
        length: int,
        labels: tuple[str, ...] = (),
        few_shot: str = "",
        eos: bool = True,
    ) -> None:
        _at_least(2, length)
        self.vocabulary, self.length, self.labels, self.few_shot, self.eos = vocabulary, length, labels, few_shot, eos

    def encode(self, example: Example) -> _Answered:
        v = self.vocabulary
        prompt, answer = prompt_and_answer(example, self.labels)
        said = [*v.encode(answer), *([v.eos] if self.eos else [])]
        size = len(answer.encode("utf-8", "replace"))
        if len(said) > self.length:
            said = said[: self.length]
            size = len(v.decode(said).encode("utf-8", "replace"))
        given = v.encode(self.few_shot + prompt)
        room = self.length - len(said)
        return _Answered([v.bos, *given[max(0, len(given) - room) :]] if room else [v.bos], said, size, example.domain)

    def pad(self, encoded: Sequence[_Answered], rows: slice) -> AnswerBatch:
        chosen = encoded[rows]
        tokens, valid, units = padded([(e.prompt + e.answer)[:-1] for e in encoded], self.vocabulary.pad, rows)
        targets, _, _ = padded([[-1] * (len(e.prompt) - 1) + e.answer for e in encoded], -1, rows)
        return AnswerBatch(
            tokens=tokens,
            targets=targets,
            valid=valid,
            unit_id=units,
            text_bytes=float(sum(e.bytes for e in chosen)),
            answer_bytes=whole([e.bytes for e in chosen]),
            domain=whole([e.domain for e in chosen]),
        )


def _at_least(least: int, length: int) -> None:
    if length < least:
        raise UserError(f"length must be at least {least} tokens, found {length}")
