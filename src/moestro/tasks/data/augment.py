"""Changed copies of examples: easy data augmentation, back-translation, corruption. Answers and their places survive.

Easy data augmentation: Wei & Zou 2019; with protected answers and translations round them as in Robust QA
(arXiv 2204.09598, Augmentation).
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ...core.errors import UserError
from .examples import Answer, SpanQuestion
from .split import content_number

__all__ = ["STOP_WORDS", "Eda", "augmented", "back_translated", "corrupted"]

_STOP = """
a about after all also am an and any are as at be because been before being but by can could did do does for
from had has have he her here hers him his how i if in into is it its just me more most my no nor not of on
or our out over own she should so some such than that the their them then there these they this those to too
under until up very was we were what when where which while who whom why will with would you your
"""
STOP_WORDS = frozenset(_STOP.split())
_CLEAN = str.maketrans(dict.fromkeys(string.punctuation, " "))


class Eda(NamedTuple):
    """Shares of words that each technique touches (0 = off), and how many copies are made per example.

    synonyms: share of words replaced. insertions: synonyms put in. swaps: pairs of words that change places.
    deletions: chance of a word to go.
    """

    synonyms: float = 0.3
    insertions: float = 0.0
    swaps: float = 0.0
    deletions: float = 0.0
    copies: int = 4


class _Piece(NamedTuple):
    """A run of text. kept: an answer, or a blank; nothing touches it. answers: (answer number, offset in the piece)."""

    text: str
    kept: bool
    answers: tuple[tuple[int, int], ...] = ()


def augmented(
    question: SpanQuestion,
    eda: Eda,
    table: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    as_released: bool = False,
) -> list[SpanQuestion]:
    """At most `eda.copies` changed copies of a question, different from it and from each other, without the original.

    Words of the context outside of its answers change; answers keep text, order and neighbours in between, and their
    places are exact. Stop words are neither replaced nor deleted. table: lower-case word -> words of like meaning;
    without one, and for words it lacks, synonyms are skipped. Copies are a function of (seed, id).

    as_released: the text is lower-cased and loses its punctuation first, words of the answer are protected wherever
    they stand (not from swaps, nor from insertions between them), the cleaned original is the last copy, and an answer
    is found again as the first string like it; answers that are not, and copies without any, are dropped.
    """
    shares = (eda.synonyms, eda.insertions, eda.swaps, eda.deletions)
    if min(shares) < 0 or max(shares) > 1 or eda.copies < 0:
        raise UserError(f"Eda: shares must lie between 0 and 1 and copies be at least 0, found {eda}")
    techniques = [
        change
        for share, change, needs in zip(
            shares, (_synonyms, _insertions, _swaps, _deletions), (True, True, False, False)
        )
        if share > 0 and (table or not needs)
    ]
    amounts = {_synonyms: shares[0], _insertions: shares[1], _swaps: shares[2], _deletions: shares[3]}
    table = table or {}
    question = _cleaned(question) if as_released else question
    protected = STOP_WORDS
    if as_released:
        protected = protected | {word for a in question.answers for word in a.text.split()}
    changing = question._replace(answers=()) if as_released else question
    pieces = _pieces(changing)
    per = eda.copies // len(techniques) + 1 if techniques else 0
    draw = random.Random(content_number(f"eda {seed} {question.id}"))
    made: list[SpanQuestion] = []
    seen = {question.context}
    for technique in techniques:
        for _ in range(per):
            copy = _joined(changing, technique(pieces, amounts[technique], table, protected, draw))
            if copy.context not in seen:
                seen.add(copy.context)
                made.append(copy)
    draw.shuffle(made)
    made = made[: eda.copies]
    if as_released:
        made = [q for copy in [*made, question] if (q := _found_again(copy, question.answers)).answers]
    return [copy._replace(id=f"{question.id}/eda{i}") for i, copy in enumerate(made)]


def back_translated(
    question: SpanQuestion, translate: Callable[[str], str], least: int = 6, name: str = "back"
) -> SpanQuestion:
    """The question with its context translated there and back round the answers, which stay as they are.

    translate: English in, English out (there and back), or any other rewriting. Pieces of fewer than `least` words are
    left alone; blanks at the ends of a piece are kept, so a translator that changes nothing gives back the context.
    """
    pieces = []
    for piece in _around(question):
        core = piece.text.strip()
        if not piece.kept and len(core.split()) >= least:
            before, _, after = piece.text.partition(core)
            piece = _Piece(before + translate(core).strip() + after, False)
        pieces.append(piece)
    return _joined(question, pieces)._replace(id=f"{question.id}/{name}")


def corrupted(text: str, share: float, seed: int = 0, kinds: Sequence[str] = ("swap", "drop", "misspell")) -> str:
    """A text in which a share of its words (rounded, at least one where share > 0) is damaged, for tests of robustness.

    kinds: swap = changes places with the next word; drop = is left out; misspell = two neighbouring letters change
    places (one is doubled where they are equal). A function of (text, share, seed, kinds).
    """
    known = {"swap", "drop", "misspell"}
    if not 0 <= share <= 1 or not kinds or not set(kinds) <= known:
        raise UserError(
            f"corrupted: share between 0 and 1 and kinds of {sorted(known)}, found {share} and {list(kinds)}"
        )
    words: list[str | None] = list(text.split())
    count = min(len(words), max(1, round(share * len(words)))) if share > 0 else 0
    draw = random.Random(content_number(f"corrupt {seed} {text}"))
    for i in sorted(draw.sample(range(len(words)), count)):
        kind = kinds[draw.randrange(len(kinds))]
        word = words[i]
        if word is None:
            continue
        if kind == "drop" and sum(w is not None for w in words) > 1:
            words[i] = None
        elif kind == "swap" and i + 1 < len(words):
            words[i], words[i + 1] = words[i + 1], word
        else:
            words[i] = _misspelt(word, draw)
    return " ".join(word for word in words if word is not None)


def _misspelt(word: str, draw: random.Random) -> str:
    if len(word) < 2:
        return word * 2
    i = draw.randrange(len(word) - 1)
    if word[i] == word[i + 1]:
        return word[: i + 1] + word[i:]
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


# Pieces -----------------------------------------------------------------------------------------------------------


def _around(question: SpanQuestion) -> list[_Piece]:
    """The context cut round its answers; answers that overlap or touch are one piece."""
    regions: list[tuple[int, int]] = []
    for low, high in sorted((a.start, a.start + len(a.text)) for a in question.answers):
        if regions and low <= regions[-1][1]:
            regions[-1] = regions[-1][0], max(high, regions[-1][1])
        else:
            regions.append((low, high))
    pieces: list[_Piece] = []
    at = 0
    for low, high in regions:
        inside = tuple(
            (i, a.start - low) for i, a in enumerate(question.answers) if low <= a.start < max(high, low + 1)
        )
        pieces += [_Piece(question.context[at:low], False), _Piece(question.context[low:high], True, inside)]
        at = high
    return [p for p in [*pieces, _Piece(question.context[at:], False)] if p.text or p.answers]


def _pieces(question: SpanQuestion) -> list[_Piece]:
    """The context as answers, words and blanks."""
    out: list[_Piece] = []
    for piece in _around(question):
        if piece.kept:
            out.append(piece)
        else:
            out += [_Piece(text, text.isspace()) for text in re.findall(r"\s+|\S+", piece.text)]
    return out


def _joined(question: SpanQuestion, pieces: Sequence[_Piece]) -> SpanQuestion:
    """The question on the context that the pieces make; answers at their new places."""
    starts: dict[int, int] = {}
    at = 0
    for piece in pieces:
        for number, offset in piece.answers:
            starts[number] = at + offset
        at += len(piece.text)
    answers = tuple(Answer(a.text, starts[i]) for i, a in enumerate(question.answers))
    return question._replace(context="".join(p.text for p in pieces), answers=answers)


def _word(text: str) -> str:
    return text.strip(string.punctuation).lower()


def _free(pieces: Sequence[_Piece], protected: frozenset[str]) -> list[int]:
    """Numbers of the words that may change; marks that stand alone, as beside an answer, are no words."""
    return [i for i, p in enumerate(pieces) if not p.kept and _word(p.text) and _word(p.text) not in protected]


def _amount(pieces: Sequence[_Piece], share: float) -> int:
    """How many words a share is, at least one; an answer counts as one word."""
    return max(1, int(share * (len(_free(pieces, frozenset())) + sum(bool(p.answers) for p in pieces))))


def _replaced(text: str, word: str) -> str:
    """The word with the punctuation round the old one, and its capital."""
    bare = text.strip(string.punctuation)
    return text.replace(bare, word.capitalize() if bare[:1].isupper() else word, 1)


def _synonyms(
    pieces: list[_Piece],
    share: float,
    table: Mapping[str, Sequence[str]],
    protected: frozenset[str],
    draw: random.Random,
) -> list[_Piece]:
    out = list(pieces)
    free = [i for i in _free(pieces, protected) if table.get(_word(pieces[i].text))]
    for i in draw.sample(free, min(len(free), _amount(pieces, share))):
        out[i] = _Piece(_replaced(pieces[i].text, draw.choice(list(table[_word(pieces[i].text)]))), False)
    return out


def _insertions(
    pieces: list[_Piece],
    share: float,
    table: Mapping[str, Sequence[str]],
    protected: frozenset[str],
    draw: random.Random,
) -> list[_Piece]:
    free = [i for i in _free(pieces, protected) if table.get(_word(pieces[i].text))]
    words = _free(pieces, frozenset())
    out = [[p] for p in pieces]
    for _ in range(_amount(pieces, share) if free else 0):
        said = draw.choice(list(table[_word(pieces[draw.choice(free)].text)]))
        out[draw.choice(words)][:0] = [_Piece(said, False), _Piece(" ", True)]
    return [p for group in out for p in group]


def _swaps(
    pieces: list[_Piece],
    share: float,
    table: Mapping[str, Sequence[str]],
    protected: frozenset[str],
    draw: random.Random,
) -> list[_Piece]:
    out = list(pieces)
    words = _free(pieces, frozenset())
    for _ in range(_amount(pieces, share) if len(words) > 1 else 0):
        i, j = draw.sample(words, 2)
        out[i], out[j] = out[j], out[i]
    return out


def _deletions(
    pieces: list[_Piece],
    share: float,
    table: Mapping[str, Sequence[str]],
    protected: frozenset[str],
    draw: random.Random,
) -> list[_Piece]:
    gone = {i for i in _free(pieces, protected) if draw.random() < share}
    out: list[_Piece] = []
    for i, piece in enumerate(pieces):
        if i in gone or (i - 1 in gone and piece.kept and not piece.answers):
            continue
        out.append(piece)
    if len(pieces) - 1 in gone and out and out[-1].kept and not out[-1].answers:
        out.pop()
    return out


# The released behaviour -------------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    return " ".join(text.lower().translate(_CLEAN).split())


def _cleaned(question: SpanQuestion) -> SpanQuestion:
    answers = tuple(Answer(_clean(a.text), a.start) for a in question.answers)
    return _found_again(question._replace(context=_clean(question.context)), answers)


def _found_again(question: SpanQuestion, answers: Sequence[Answer]) -> SpanQuestion:
    found = ((a.text, question.context.find(a.text)) for a in answers if a.text)
    return question._replace(answers=tuple(Answer(text, at) for text, at in found if at >= 0))
