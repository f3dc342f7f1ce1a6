"""What a pass spends on its units, by hand: by layer, by label, by difficulty (21)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moestro.core.errors import UserError
from moestro.core.plan import Plan
from moestro.core.trail import Key, Record, Trail
from moestro.trace.config import Recording
from moestro.trace.record import Recorder
from moestro.trace.spending import experts_by_label, experts_by_layer, quantile_labels, spent

CHOICES = {  # six units; experts by layer
    "a": [[0, 1, -1], [2, -1, -1], [0, 1, 2], [1, -1, -1], [0, -1, -1], [2, 1, -1]],  # 2 1 3 1 1 2
    "b": [[0, -1, -1], [2, -1, -1], [0, 1, -1], [1, -1, -1], [0, -1, -1], [2, -1, -1]],  # 1 1 2 1 1 1
}


def trail(valid: torch.Tensor | None = None) -> Trail:
    plans = {}
    for path, rows in CHOICES.items():
        expert = torch.tensor(rows)
        plans[Key(path, 0)] = Record(plan=Plan(expert=expert, weight=(expert >= 0).float(), num_experts=3, valid=valid))
    return Trail(plans)


def test_21_experts_per_token_by_layer_and_domain() -> None:
    found = spent(trail(), [0, 0, 1, 1, 1, -1], num_labels=3)
    assert found.layers == {"a": 10 / 6, "b": 7 / 6}
    assert found.mean == pytest.approx(17 / 12)
    assert found.by is not None
    assert found.by[:2].tolist() == pytest.approx([(3 / 2 + 1) / 2, (5 / 3 + 4 / 3) / 2])
    assert math.isnan(found.by[2])
    assert spent(trail()).by is None


def test_21_padding_spends_nothing() -> None:
    valid = torch.tensor([True, True, True, False, False, False])
    found = spent(trail(valid), torch.tensor([0, 0, 1, 1, 1, 1]))
    assert found.layers == {"a": 2.0, "b": 4 / 3}
    assert found.by is not None
    assert found.by.tolist() == pytest.approx([1.25, 2.5])


def test_21_experts_per_token_by_difficulty() -> None:
    loss = [5.0, 1.0, 9.0, 2.0, 3.0, 4.0]  # easiest first: units 1, 3, 4 | 5, 0, 2
    halves = quantile_labels(loss, 2)
    assert halves.tolist() == [1, 0, 1, 0, 0, 1]
    assert spent(trail(), halves).by.tolist() == pytest.approx([1.0, (7 / 3 + 4 / 3) / 2])  # type: ignore[union-attr]
    assert quantile_labels([1.0, math.nan, 0.0]).tolist() == [2, -1, 0]


def test_traces_say_the_same() -> None:
    recorder = Recorder(Recording())
    domain = np.array([0, 0, 1, 1, 1, -1])
    recorder.sample(0, "valid", trail(), {"domain": domain})
    trace = recorder.trace()
    sample = trace.samples[0]
    found = spent(trail(), domain)
    assert experts_by_layer(trace, sample) == found.layers
    by = experts_by_label(trace, sample, "domain")
    assert np.mean(list(by.values()), axis=0).tolist() == found.by.tolist()  # type: ignore[union-attr]
    with pytest.raises(UserError, match="5 labels for 6 units"):
        experts_by_label(trace, sample, [0] * 5)


def test_errors() -> None:
    with pytest.raises(UserError, match="no routed layer"):
        spent(Trail({}))
    with pytest.raises(UserError, match="3 labels for 6 units"):
        spent(trail(), [0, 1, 1])
