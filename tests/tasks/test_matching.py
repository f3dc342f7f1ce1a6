"""Batches of pairs in groups of one domain; F1max and cosines of a model (34, evaluation)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.tasks.data.batches import ExampleBatches
from moestro.tasks.data.collate import PairedTexts
from moestro.tasks.data.config import ByteVocabulary
from moestro.tasks.data.examples import Pair
from moestro.tasks.matching import GroupedPairs, match

COLLATE = PairedTexts(ByteVocabulary().build(()), 6)


def part(domain: int, count: int = 5) -> ExampleBatches:
    return ExampleBatches([Pair(f"{domain}{i}", f"{domain}{i}!", True, domain) for i in range(count)], COLLATE, seed=3)


def test_groups_are_of_one_domain_each_and_every_epoch_has_each_pair_once() -> None:
    data = GroupedPairs([part(0, 4), part(1, 6)], group=2)
    batch = data.train(0, 8)
    assert batch.domain.tolist() == [0] * 4 + [1] * 4
    assert not set(batch.a_unit_id.tolist()) & set(batch.b_unit_id.tolist())
    seen = [int(row[2]) for step in range(3) for row, d in _rows(data.train(step, 8)) if d == 1]
    assert sorted(seen[:6]) == [ord("0") + i for i in range(6)]  # of three batches of four: two epochs of six
    assert sorted(seen[6:]) == sorted(seen[:6])
    again = data.train(1, 8)
    assert torch.equal(again.a, data.train(1, 8).a)
    for size in (6, 9, 0):
        with pytest.raises(UserError, match="not equally many groups of 2 for 2 parts"):
            data.train(size=size, step=0)
    with pytest.raises(UserError, match="groups of 2 pairs or more"):
        GroupedPairs([part(0)], group=1)


def _rows(batch: Any) -> list[tuple[Tensor, int]]:
    return list(zip(batch.a, batch.domain.tolist()))


class Turn(nn.Module):
    """A text -> a unit vector, turned by 30 degrees per unit of its second character, and by 90 for domain 1."""

    def forward(self, tokens: Tensor, signals: Signals) -> tuple[Tensor, None, None]:
        assert signals.label is not None
        assert not self.training
        angle = (tokens[:, 1] - ord("0")) * torch.pi / 6 + signals.label.view(tokens.shape)[:, 0] * torch.pi / 2
        return torch.stack([angle.cos(), angle.sin()], 1) * (1.0 + tokens[:, 1:2]), None, None


def test_f1max_and_cosines_of_a_model_by_hand() -> None:
    """Angles between the two texts 0, 30 and 90 degrees (related: the first two and the last), 60 (not related)."""
    rows = [("0", "0", True), ("0", "1", True), ("1", "4", True), ("1", "3", False)]
    data = ExampleBatches([Pair(a, b, s, 1) for a, b, s in rows], COLLATE)
    model = Turn().train()
    found = match(model, (batch for _, batch in data.each(3)))
    assert model.training
    assert found.best.f1 == pytest.approx(6 / 7)  # all taken: precision 3/4, recall 1; the first two: 4/5
    assert found.cosines.others == pytest.approx(0.5)
    assert found.cosines.related == pytest.approx((1 + 3**0.5 / 2) / 3)
