"""Pairs of texts in domains: batches whose negatives are of one domain, and how well a model tells related pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..core.errors import UserError
from ..core.signals import Signals
from .data.batches import ExampleBatches, PairBatch, epoch_order
from .metrics import BestF1, Similarities, best_f1, similarities
from .predictions import told

__all__ = ["GroupedPairs", "Matched", "match"]


class GroupedPairs:
    """Batches of groups of pairs, each group from one part (a domain), for `MatchPairs(group=...)`.

    Pairs of one domain are each other's negatives, which is harder than to tell domains apart. parts: their examples,
    with one collate; every part gives equally many groups of a batch. Raises `UserError` where that is impossible.
    """

    def __init__(self, parts: Sequence[ExampleBatches], group: int) -> None:
        if not parts or group < 2:
            raise UserError("GroupedPairs: needs a part at least, and groups of 2 pairs or more")
        self.parts, self.group = parts, group

    def train(self, step: int, size: int) -> PairBatch:
        """The batch of `size` pairs of this step: a function of the parts' seeds and the step."""
        share, rest = divmod(size, len(self.parts))
        if rest or share % self.group or not share:
            raise UserError(
                f"GroupedPairs: {size} pairs are not equally many groups of {self.group} for {len(self.parts)} parts"
            )
        rows = []
        for part in self.parts:
            order = epoch_order(len(part.examples), part.seed, step, share)
            rows += [part.collate.encode(part.examples[int(i)]) for i in order]
        return self.parts[0].collate.pad(rows, slice(0, len(rows)))


class Matched(NamedTuple):
    """F1max with its threshold, and the mean cosines of related and of other pairs."""

    best: BestF1
    cosines: Similarities


@torch.no_grad()
def match(model: nn.Module, batches: Iterable[PairBatch], signals: Signals | None = None) -> Matched:
    """The cosines of the embeddings of all pairs, as scores of "related", in evaluation mode. The domain of a pair is
    the signal `label` of its tokens. Source: 34 (arXiv 2401.15713), evaluation."""
    signals, training = Signals() if signals is None else signals, model.training
    model.eval()
    cosines: list[float] = []
    related: list[bool] = []
    for batch in batches:
        a, *_ = model(batch.a, told(signals, batch.a, batch.a_unit_id, batch.a_valid, batch.domain))
        b, *_ = model(batch.b, told(signals, batch.b, batch.b_unit_id, batch.b_valid, batch.domain))
        cosines += torch.cosine_similarity(a.float(), b.float()).tolist()
        related += batch.similar.tolist()
    model.train(training)
    return Matched(best_f1(cosines, related), similarities(cosines, related))
