"""BLEU of a corpus: Papineni et al. 2002, with the tokenisation of mteval-v13a."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...core.errors import UserError

__all__ = ["Bleu", "bleu", "words_13a"]


class Bleu(NamedTuple):
    """score: 0 to 100. precisions: of n-grams of 1..order, 0 to 1. brevity: the penalty. Lengths in tokens."""

    score: float
    precisions: tuple[float, ...]
    brevity: float
    hypothesis_length: int
    reference_length: int


def bleu(
    hypotheses: Sequence[str],
    references: Sequence[str | Sequence[str]],
    order: int = 4,
    smooth: bool = False,
    tokenise: Callable[[str], list[str]] | None = None,
) -> Bleu:
    """BLEU = brevity * exp(mean_n log p_n), counts pooled over the corpus before the quotients are taken.

    p_n: n-grams of the hypotheses that also stand in a reference, each at most as often as in the one that has most of
    it, over all n-grams of the hypotheses. brevity = min(1, exp(1 - r / c)), c the length of all hypotheses, r that of
    the references nearest in length (the shorter of two). references: one text, or several, per hypothesis.
    smooth: n-gram orders without a match count 1/2, 1/4, ... of a match (the first such order 1/2), so that few
    sentences give more than 0. tokenise: default `words_13a`.
    """
    if len(hypotheses) != len(references) or not hypotheses:
        raise UserError(
            f"BLEU: {len(hypotheses)} hypotheses and {len(references)} references; need as many, at least one"
        )
    tokenise = words_13a if tokenise is None else tokenise
    matched, total = [0] * order, [0] * order
    c = r = 0
    for hypothesis, given in zip(hypotheses, references):
        said = tokenise(hypothesis)
        wanted = [tokenise(text) for text in ([given] if isinstance(given, str) else given)]
        if not wanted:
            raise UserError("BLEU: a hypothesis without a reference")
        c += len(said)
        r += min((abs(len(w) - len(said)), len(w)) for w in wanted)[1]
        for n in range(1, order + 1):
            most: collections.Counter[tuple[str, ...]] = collections.Counter()
            for words in wanted:
                most |= _grams(words, n)
            found = _grams(said, n)
            matched[n - 1] += sum((found & most).values())
            total[n - 1] += sum(found.values())
    half, precisions = 1.0, []
    for m, t in zip(matched, total):
        if smooth and not m and t:
            half /= 2
            precisions.append(half / t)
        else:
            precisions.append(m / t if t else 0.0)
    brevity = 0.0 if not c else min(1.0, math.exp(1 - r / c))
    mean = sum(map(math.log, precisions)) / order if min(precisions) > 0 else -math.inf
    return Bleu(100 * brevity * math.exp(mean), tuple(precisions), brevity, c, r)


def words_13a(text: str) -> list[str]:
    """Words and marks: marks stand alone, but for full stops and commas inside numbers, and hyphens inside words."""
    for said, char in (("&quot;", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(said, char)
    text = f" {text} "
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", text)
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def _grams(words: Sequence[str], n: int) -> collections.Counter[tuple[str, ...]]:
    return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
