"""Positions that are added to embeddings, and the plain MLP."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.core.errors import UserError
from moestro.nn import Learned, PlainFeedForward, Sinusoidal
from moestro.testing.compare import assert_close


@pytest.mark.parametrize("config", [Learned(), Sinusoidal(), Sinusoidal(endpoint=True, first=2)])
def test_whole_parts_and_given_positions_agree(config: Learned | Sinusoidal) -> None:
    m = config.build(8, 10)
    h = torch.randn(2, 6, 8)
    whole = m(h)
    assert torch.equal(torch.cat((m(h[:, :4]), m(h[:, 4:], None, 4)), 1), whole)
    assert torch.equal(m(h, torch.arange(6).repeat(2)), whole)
    assert not torch.allclose(whole[:, 1] - h[:, 1], whole[:, 2] - h[:, 2])
    with pytest.raises(UserError, match="11 tokens do not fit the model's context of 10"):
        m(h, None, 5)


def test_sinusoids_by_hand() -> None:
    h = torch.zeros(1, 4, 6)
    y = Sinusoidal(base=100.0).build(6, 4)(h)[0]
    for place in range(4):
        for i in range(3):
            angle = place * 100.0 ** (-2 * i / 6)
            assert y[place, i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert y[place, 3 + i] == pytest.approx(math.cos(angle), abs=1e-6)
    with pytest.raises(UserError, match="must be even"):
        Sinusoidal().build(5, 4)


def test_sinusoids_of_fairseq_by_hand() -> None:
    """The last of the D/2 wavelengths is 2 pi base, and positions begin behind the padding token."""
    y = Sinusoidal(base=100.0, endpoint=True, first=2).build(6, 4)(torch.zeros(1, 4, 6))[0]
    for place in range(4):
        for i, rate in enumerate((1.0, 0.1, 0.01)):
            assert y[place, i] == pytest.approx(math.sin((place + 2) * rate), abs=1e-6)
            assert y[place, 3 + i] == pytest.approx(math.cos((place + 2) * rate), abs=1e-6)
    with pytest.raises(UserError, match="with endpoint at least 4"):
        Sinusoidal(endpoint=True).build(2, 4)
    with pytest.raises(UserError, match=r"Sinusoidal\.first"):
        Sinusoidal(first=-1)


@pytest.mark.parametrize("bias", [False, True])
def test_plain_mlp(bias: bool) -> None:
    m = PlainFeedForward(width=12, bias=bias).build(8).double()
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    y, _, trail = m(x)
    assert not trail
    hidden = x @ m.up.T + (m.up_bias if bias else 0)
    want = hidden.clamp_min(0) @ m.down.T + (m.down_bias if bias else 0)
    assert_close("y", y, want, 1e-12)
    assert PlainFeedForward(width=12, bias=bias).num_params(dim=8) == sum(p.numel() for p in m.parameters())
    assert PlainFeedForward(width=12).flops_per_token(1, dim=8) == 2 * 2 * 12 * 8
