"""Attention of one decoded token in C: every kind of attention, against whole passes in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.nn import Attention, Rotary, YaRN
from moestro.nn.norm import RMSNorm
from moestro.testing.compare import assert_close
from nn.test_attention import VARIANTS, B, D, S, make
from ops.native_cases import compiles

KINDS = VARIANTS | {
    "yarn": Attention(num_heads=2, positions=Rotary(scaling=YaRN(factor=4.0, original_context=4))),
    "wide_window": Attention(num_heads=2, num_kv_heads=1, head_dim=8, window=S - 2),
}


def inputs() -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))


def no_kernel(*args: object, **kwargs: object) -> Tensor:
    raise AssertionError("torch's attention was called")


@compiles
@pytest.mark.parametrize("name", KINDS)
def test_token_by_token_equals_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, x = make(KINDS[name]), inputs()
    value = torch.randn(B, S, 5, generator=torch.Generator().manual_seed(2))
    kernel = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        want, _, map_ = exact(x.double(), None, None, operator=True)
        seen = map_(value.double().view(B * S, 5)).view(B, S, 5)
        m = make(KINDS[name]).float()
        state, parts = m.new_state(S), []
        for t, part in enumerate(x.split((2,) + (1,) * (S - 2), dim=1)):
            alone = state.key is not None and state.held < state.key.shape[2]
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", no_kernel if alone else kernel)
            y, state, attend = m(part, None, state, operator=True)
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
            parts.append(y)
            if t > 1:
                held = value[:, : t + 2].reshape(-1, 5)
                assert_close(f"A v of token {t + 1}", attend(held), seen[:, t + 1], 1e-5)
    assert state.length == S
    assert_close("y", torch.cat(parts, 1), want, 1e-5)


@compiles
def test_an_earlier_state_stays_readable_and_errors_stay() -> None:
    m, x = make(VARIANTS["grouped"]).float(), inputs()
    with torch.no_grad():
        _, first = m(x[:, :4], None, m.new_state(5))
        keys = first.seen()[0].clone()
        _, second = m(x[:, 4:5], None, first)
        assert torch.equal(first.seen()[0], keys)
        assert (first.length, second.length) == (4, 5)
        with pytest.raises(UserError, match="holds 5 tokens, 6 are needed"):
            m(x[:, 5:6], None, second)
        with pytest.raises(UserError, match=r"begun with \d sequences"):
            m(x[:1, 4:5], None, first)


@compiles
def test_norms_of_heads_are_the_kernels_unless_they_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = make(VARIANTS["head_norm"]).float(), inputs()
    forward, called, seen = RMSNorm.forward, [], []

    def count(norm: RMSNorm, h: Tensor) -> Tensor:
        called.append(norm)
        return forward(norm, h)

    with torch.no_grad():
        _, state = m(x[:, :4], None, m.new_state(S))
        monkeypatch.setattr(RMSNorm, "forward", count)
        want, _ = m(x[:, 4:5], None, state)
        assert not called
        assert m.k_norm is not None
        m.k_norm.register_forward_hook(lambda *_: seen.append(1))
        got, _ = m(x[:, 4:5], None, state)
        assert (len(called), len(seen)) == (2, 1)
        assert_close("y", got, want, 1e-5)
        with pytest.raises(UserError, match="capacity|holds"):
            m(x[:, 4:5], None, dataclasses.replace(state, length=S))


def test_marks_take_the_way_of_torch() -> None:
    """Padding and packing are not the C kernel's: what it would overlook changes the output."""
    m, x = make(VARIANTS["plain"]).float(), inputs()
    with torch.no_grad():
        valid = torch.ones(B, 3, dtype=torch.bool)
        valid[:, 0] = False
        _, state = m(x[:, :3], Signals(valid=valid.reshape(-1)), m.new_state(S))
        y, after = m(x[:, 3:4], None, state)
        want, _ = m(x[:, :4], Signals(valid=torch.cat((valid, valid[:, 1:2]), 1).reshape(-1)))
        assert_close("y", y, want[:, 3:], 1e-5)
        assert after.valid is not None
