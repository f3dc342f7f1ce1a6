"""The objective of language modelling is a sum; objectives that are not are rejected."""

from __future__ import annotations

import pytest
import torch

from broken import objectives
from moestro.models.examples import examples
from moestro.tasks.batches import Batch
from moestro.tasks.config import NextToken
from moestro.tasks.language import NextTokenObjective
from moestro.testing.objectives import check_objective


def batch(rows: slice = slice(0, 5), length: int = 9) -> Batch:
    """Some of five sequences; a few targets are missing."""
    tokens = torch.randint(0, 37, (5, length), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    targets[1, 3:] = -1
    units = torch.arange(5 * length).reshape(5, length)[rows].reshape(-1)
    return Batch(tokens=tokens[rows], targets=targets[rows], unit_id=units, text_bytes=0.0)


PARTS = [batch(slice(0, 1)), batch(slice(1, 5))]


@pytest.mark.parametrize("name", examples())
def test_next_token(name):
    check_objective(NextTokenObjective(NextToken()), examples()[name].build(), batch(), PARTS)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (objectives.MeanOfTokens, "loss: sum over the parts"),
        (objectives.LosesTheTrail, "left no record"),
        (objectives.CountsPadding, r"count\(\) promised 45"),
    ],
)
def test_objectives_that_do_not_add_up_are_rejected(broken, reason):
    with pytest.raises(AssertionError, match=reason):
        check_objective(broken(), examples()["moe"].build(), batch(), PARTS)
