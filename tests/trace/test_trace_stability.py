"""Fluctuation and Jaccard (03), experts per unit by layer and label (21), and entropies before and after a mix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moestro.core.errors import UserError
from moestro.trace.record import Recorder
from moestro.trace.spending import (
    certainty,
    experts_by_label,
    experts_by_layer,
    experts_per_unit,
    mean_experts,
    quantile_labels,
)
from moestro.trace.stability import fluctuation, fluctuation_rate, jaccard, sets, sets_of_sample
from trace_cases import plan, random_trail, trail

EARLY = [[0, 1], [2, 3], [1, 2], [0, 3]]
LATE = [[1, 0], [2, 0], [0, 3], [0, 3]]


def test_fluctuation_and_jaccard_by_hand():
    """{0,1} stays, whatever the order; {2,3} -> {2,0} shares one of three; {1,2} -> {0,3} shares none; {0,3} stays."""
    early, late = (sets(trail({"a": plan(e), "b": plan(EARLY)})) for e in (EARLY, LATE))
    assert fluctuation(early, late) == {"a": 0.5, "b": 0.0}
    assert fluctuation_rate(early, late) == 0.25
    assert jaccard(early, late) == pytest.approx({"a": (1 + 1 / 3 + 0 + 1) / 4, "b": 1.0})


def test_padding_and_sets_of_unequal_size():
    valid = torch.tensor([True, False, True, True])
    early = sets(trail({"a": plan([[0, -1], [0, 1], [1, 2], [-1, -1]], valid=valid)}))
    late = sets(trail({"a": plan([[0, 1], [2, 3], [2, 1], [-1, -1]], valid=valid)}))
    assert fluctuation(early, late)["a"] == pytest.approx(1 / 3)
    assert jaccard(early, late)["a"] == pytest.approx((0.5 + 1 + 1) / 3)


def test_a_model_against_itself_and_against_permuted_experts():
    made = random_trail(0, units=400, experts=(8,))
    itself = sets(made)
    assert fluctuation_rate(itself, itself) == 0.0
    (one,) = made.plans().values()
    turned = sets(trail({"blocks.0.ffn": plan((one.expert + 3) % 8, 8)}))
    assert fluctuation_rate(itself, turned) > 0.8


def test_what_cannot_be_compared_is_named():
    one = sets(trail({"a": plan(EARLY)}))
    with pytest.raises(UserError, match="same layers.*b"):
        fluctuation(one, sets(trail({"b": plan(EARLY)})))
    with pytest.raises(UserError, match="4 units and 4 experts in one, 2 and 4"):
        jaccard(one, sets(trail({"a": plan(EARLY[:2])})))


def sampled(made, **columns):
    recorder = Recorder()
    recorder.count(1, made)
    recorder.sample(1, "probe", made, columns)
    trace = recorder.trace()
    return trace, trace.samples[0]


def test_samples_of_a_trace_are_compared_alike():
    (a, early), (b, late) = (sampled(trail({"a": plan(e)})) for e in (EARLY, LATE))
    assert fluctuation(sets_of_sample(a, early), sets_of_sample(b, late)) == {"a": 0.5}


def test_experts_per_unit_by_layer_and_by_label():
    """Top-p: 1, 3, 2 experts and padding; labels 0, 1, 1: means 1 and 2.5."""
    valid = torch.tensor([True, True, True, False])
    made = trail(
        {
            "low": plan([[0, -1, -1], [1, 2, 3], [2, 0, -1], [1, -1, -1]], valid=valid),
            "top": plan([[0], [1], [2], [3]], valid=valid),
        }
    )
    trace, sample = sampled(made, domain=torch.tensor([0, 1, 1, 0]))
    assert experts_per_unit(sample.tables[0], 4).tolist() == [1, 3, 2, 0]
    assert experts_by_layer(trace, sample) == {"low": 2.0, "top": 1.0}
    np.testing.assert_allclose(mean_experts(trace), [[2.0, 1.0]])
    by_label = experts_by_label(trace, sample, "domain", 3)
    np.testing.assert_allclose(by_label["low"], [1.0, 2.5, np.nan])
    np.testing.assert_allclose(by_label["top"], [1.0, 1.0, np.nan])
    np.testing.assert_allclose(experts_by_label(trace, sample, [-1, 0, -1, 0])["low"], [3.0])
    with pytest.raises(UserError, match="no column 'task'.*domain"):
        experts_by_label(trace, sample, "task")


def test_quantiles_of_losses():
    assert quantile_labels([5.0, 1.0, float("nan"), 3.0, 2.0], parts=2).tolist() == [1, 0, -1, 1, 0]
    assert np.bincount(quantile_labels(np.arange(10.0), parts=4)).tolist() == [3, 2, 3, 2]


def test_entropies_of_r_and_of_mixed_r():
    """r = (1, 0), (1/2, 1/2) mixed to (3/4, 1/4) twice: the mean rises (concave), the highest falls."""
    r, mixed = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.75, 0.25]] * 2)
    made = trail({"a": plan([[0], [0]], 2, probs=mixed, extra={"unmixed_probs": r}), "b": plan([[0], [1]], 2, probs=r)})
    found = certainty(made)
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found["a"] == pytest.approx((h, h, math.log(2) / 2, math.log(2)))
    assert found["a"].mean > found["a"].unmixed_mean
    assert found["a"].highest < found["a"].unmixed_highest
    assert found["b"] == pytest.approx((math.log(2) / 2, math.log(2)) * 2)
    with pytest.raises(UserError, match="kept no probabilities"):
        certainty(trail({"a": plan(EARLY)}))
