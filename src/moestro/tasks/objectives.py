"""Configs of objectives. What is built is `(model, batch, signals) -> Outcome`, with `count(batch)` targets."""

from __future__ import annotations

from typing import ClassVar

from ..core.config import Config, config
from ..core.errors import UserError
from ..losses.config import MNRPlus, PairLoss

__all__ = ["Classify", "FindSpan", "MatchPairs", "NextToken", "Objective", "Translate", "TwoPass", "objectives"]


@config
class Objective(Config):
    """Base of objectives: what is built is `(model, batch, signals) -> Outcome`."""

    predicts: ClassVar[bool] = True
    """Whether it is a cross-entropy of logits, which two passes can be compared in."""


@config
class NextToken(Objective):
    """Language modelling: the cross-entropy of every next token."""

    builds: ClassVar[str] = "moestro.tasks.language:NextTokenObjective"


@config
class _Smoothed(Objective):
    smoothing: float = 0.0
    """Share of each target that is spread evenly over all answers (label smoothing)."""

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise UserError(f"{type(self).__name__}.smoothing: {self.smoothing} does not lie in [0, 1)")


@config
class Translate(_Smoothed):
    """Translation by an encoder-decoder: the cross-entropy of every token of the target, with label smoothing."""

    builds: ClassVar[str] = "moestro.tasks.supervised:TranslationObjective"
    smoothing: float = 0.1
    """Share of each target that is spread evenly over all answers (label smoothing)."""


@config
class Classify(_Smoothed):
    """Classification of texts: the cross-entropy of each text's class."""

    builds: ClassVar[str] = "moestro.tasks.supervised:ClassificationObjective"


@config
class FindSpan(Objective):
    """Extractive question answering: the mean of the cross-entropies of an answer's first and last token."""

    builds: ClassVar[str] = "moestro.tasks.supervised:SpanObjective"


@config
class MatchPairs(Objective):
    """Embeddings of two texts that belong together, the other pairs of the batch as negatives."""

    builds: ClassVar[str] = "moestro.tasks.supervised:PairObjective"
    predicts: ClassVar[bool] = False
    loss: PairLoss = MNRPlus()
    """The loss of a group of pairs."""
    group: int = 0
    """Pairs that are each other's negatives, in order; 0 = all of a micro-batch, whose size then changes the loss."""

    def __post_init__(self) -> None:
        if self.group < 0 or self.group == 1:
            raise UserError(f"MatchPairs.group: {self.group} pairs have no negatives; take 2 or more, or 0 for all")


@config
class TwoPass(Objective):
    """Two passes over each batch, both trained on the targets and kept alike by a symmetric KL (THOR, R-Drop)."""

    builds: ClassVar[str] = "moestro.tasks.two_pass:TwoPassObjective"
    inner: Objective = NextToken()
    """What each pass is trained for."""
    alpha: float = 5.0
    """Factor on the consistency of the two."""

    def __post_init__(self) -> None:
        self.at_least(0, "alpha")
        if not self.inner.predicts or isinstance(self.inner, TwoPass):
            raise UserError(f"TwoPass.inner: {type(self.inner).__name__} makes no logits that two passes can agree on")


def objectives() -> dict[str, Objective]:
    """One small config of every kind, by name; tests are generated from it."""
    return {
        "next_token": NextToken(),
        "translate": Translate(),
        "translate_plain": Translate(smoothing=0.0),
        "classify": Classify(smoothing=0.1),
        "find_span": FindSpan(),
        "match_pairs": MatchPairs(group=2),
        "two_pass": TwoPass(),
        "two_pass_translate": TwoPass(inner=Translate(), alpha=2.0),
        "two_pass_classify": TwoPass(inner=Classify()),
        "two_pass_find_span": TwoPass(inner=FindSpan(), alpha=1.0),
    }
