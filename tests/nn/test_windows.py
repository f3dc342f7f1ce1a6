"""Windows on both sides of a token, where attention is not causal (ModernBERT's local attention)."""

from __future__ import annotations

import pytest
import torch

from moestro.core.signals import Signals
from moestro.nn.config import Attention, NoNorm, RelativeBias
from moestro.nn.mask import visible
from moestro.testing.compare import assert_close

S, D = 7, 8


def test_who_sees_whom_by_hand() -> None:
    mask = visible(4, 4, window=2, causal=False)
    assert mask is not None
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert visible(3, 3, window=3, causal=False) is None


@pytest.mark.parametrize("positions", [None, RelativeBias(buckets=8, max_distance=9)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_token_depends_on_its_window_only(positions: RelativeBias | None, padded: bool) -> None:
    layer = Attention(num_heads=2, causal=False, window=3, positions=positions).build(D).double()
    x = torch.randn(2, S, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    valid = torch.arange(S)[None] < torch.tensor([[7], [5]]) if padded else None
    signals = None if valid is None else Signals(valid=valid.reshape(-1))
    y, _ = layer(x, signals)
    for t in range(S):
        other = x.clone()
        other[:, t] += 1
        moved = (layer(other, signals)[0] - y).abs().sum(-1) > 1e-12
        for b in range(2):
            if valid is None or valid[b, t]:
                real = torch.ones(S, dtype=torch.bool) if valid is None else valid[b]
                assert (moved[b] & real).tolist() == [abs(i - t) < 3 and bool(real[i]) for i in range(S)]


def test_the_operator_has_the_window_too() -> None:
    layer = Attention(num_heads=2, causal=False, window=2).build(D).double()
    _, _, attend = layer(torch.randn(1, 4, D, dtype=torch.float64), None, None, True)
    rows = attend(torch.eye(4, dtype=torch.float64))
    assert_close("zeros", (rows > 0).double(), visible(4, 4, window=2, causal=False).double(), 0.0)  # type: ignore[union-attr]


def test_no_norm_is_the_identity() -> None:
    x = torch.randn(3, D)
    norm = NoNorm().build(D)
    assert norm(x) is x
    assert not list(norm.parameters())
