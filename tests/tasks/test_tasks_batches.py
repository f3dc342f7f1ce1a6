"""Batches: an order that is a function of seed and step, whoever asks for which part."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moestro.core.errors import UserError
from moestro.tasks.batches import Batches, permute
from moestro.tasks.corpus import Corpus


def corpus(train=2000, valid=300, lengths=None):
    return Corpus(
        train=(np.arange(train) % 251).astype(np.uint8),
        valid=(np.arange(valid) % 251).astype(np.uint8),
        valid_lengths=lengths,
        bytes_per_token=1.0,
        key="k",
        record={},
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_permute_is_a_bijection_that_depends_on_its_key(size):
    made = permute(np.arange(size), size, 123)
    assert sorted(made) == list(range(size))
    if size > 10:
        assert (made != permute(np.arange(size), size, 124)).mean() > 0.8
        assert abs(np.corrcoef(made, np.arange(size))[0, 1]) < 0.5


def test_any_slice_is_a_slice_of_the_global_batch():
    batches = Batches(corpus(), 16, seed=3)
    whole = batches.train(5, 8)
    for start, stop in ((0, 3), (3, 8), (7, 8)):
        part = batches.train(5, 8, start, stop)
        assert torch.equal(part.tokens, whole.tokens[start:stop])
        assert torch.equal(part.unit_id, whole.unit_id[start * 16 : stop * 16])
    assert torch.equal(whole.unit_id, torch.arange(8 * 16))
    assert torch.equal(whole.tokens[:, 1:], whole.targets[:, :-1])


def test_an_epoch_visits_every_window_once_and_the_next_differs():
    batches = Batches(corpus(), 16, seed=0)
    n = batches.windows
    starts = batches.starts(0, n)
    assert len(set(starts)) == n
    assert (np.diff(np.sort(starts)) == 16).all()
    assert starts.max() + 17 <= 2000
    again = batches.starts(1, n)
    assert len(set(again)) == n
    assert (starts != again).any()
    assert (Batches(corpus(), 16, seed=1).starts(0, n) != starts).any()
    ragged = np.concatenate([batches.starts(s, 7) for s in range(2 * n // 7)])
    both = np.concatenate([starts, again])
    assert (ragged == both[: len(ragged)]).all()  # the stream does not know the batch size


def test_validation_windows_are_fixed_and_apart():
    batches = Batches(corpus(valid=1000), 16, seed=0)
    for limit in (1, 5, 10_000):
        starts = batches.valid_windows(limit)
        assert len(starts) == min(limit, 999 // 16)
        assert starts.min() >= 0
        assert starts.max() + 17 <= 1000
        assert (np.diff(starts) >= 16).all()


def test_bytes_of_held_out_text_are_those_of_its_tokens():
    lengths = np.arange(300).astype(np.uint32)
    batches = Batches(corpus(lengths=lengths), 16, seed=0)
    assert batches.valid(np.array([10, 50])).text_bytes == sum(range(11, 27)) + sum(range(51, 67))
    assert Batches(corpus(), 16, seed=0).valid(np.array([10])).text_bytes == 16


@pytest.mark.parametrize(("train", "valid", "said"), [(16, 300, "training"), (300, 16, "validation")])
def test_too_little_text_is_an_error(train, valid, said):
    with pytest.raises(UserError, match=f"{said} text has only 16 tokens"):
        Batches(corpus(train, valid), 16, seed=0)


def test_a_text_of_one_window_will_do():
    batches = Batches(corpus(17, 17), 16, seed=0)
    assert batches.starts(3, 4).tolist() == [0, 0, 0, 0]
    assert batches.valid_windows(9).tolist() == [0]
