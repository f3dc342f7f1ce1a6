"""Attention against a float64 oracle that writes out every score; caches; the attention as an operator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.nn import Attention, Rotary
from moestro.nn.attention import Attention as AttentionModule
from moestro.nn.cache import KVCache
from moestro.testing.compare import assert_close

B, S, D = 3, 9, 24

VARIANTS = {
    "plain": Attention(num_heads=2, head_dim=6),
    "grouped": Attention(num_heads=6, num_kv_heads=2, head_dim=4),
    "one_key_head": Attention(num_heads=4, num_kv_heads=1, bias="all"),
    "head_norm": Attention(num_heads=4, num_kv_heads=2, qk_norm="head", bias="qkv"),
    "full_norm": Attention(num_heads=4, num_kv_heads=2, head_dim=6, qk_norm="full"),
    "window": Attention(num_heads=2, num_kv_heads=1, head_dim=8, window=3),
    "unscaled": Attention(num_heads=2, head_dim=4, scale=1.0, positions=None),
    "sinks": Attention(num_heads=6, num_kv_heads=2, head_dim=4, bias="all", sinks=True),
    "sinks_window": Attention(num_heads=4, num_kv_heads=2, head_dim=8, window=3, qk_norm="head", sinks=True),
    "partial": Attention(num_heads=2, head_dim=8, positions=Rotary(fraction=0.5, style="interleaved")),
}


def make(config: Attention) -> AttentionModule:
    torch.manual_seed(0)
    module = config.build(D)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.double()


def inputs(n: int = S) -> Tensor:
    return torch.randn(B, n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def oracle(
    m: AttentionModule,
    x: Tensor,
    valid: Tensor | None = None,
    segment: Tensor | None = None,
    position: Tensor | None = None,
    value: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Query by query, head by head. With `value` [B, S, C] also the mean over heads of the map times it."""
    c, d = m.config, m.head_dim
    n = x.shape[1]
    q, k, v = m.q(x), m.k(x), m.v(x)

    def rms(t: Tensor, gain: Tensor) -> Tensor:
        return t / (t.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * gain

    if c.qk_norm == "full":
        q, k = rms(q, m.q_norm.weight), rms(k, m.k_norm.weight)  # type: ignore[union-attr]
    q, k, v = (t.view(B, n, -1, d) for t in (q, k, v))
    if c.qk_norm == "head":
        q, k = rms(q, m.q_norm.weight), rms(k, m.k_norm.weight)  # type: ignore[union-attr]
    if m.positions is not None:
        q, k = m.positions(q, k, torch.arange(n).expand(B, n) if position is None else position)
    group = m.num_heads // m.num_kv_heads
    scale = 1 / math.sqrt(d) if c.scale is None else c.scale
    heads = torch.zeros(B, n, m.num_heads, d, dtype=x.dtype)
    mixed = None if value is None else torch.zeros_like(value)
    for b in range(B):
        for h in range(m.num_heads):
            for i in range(n):
                seen = [
                    j
                    for j in range(i + 1)
                    if (c.window is None or i - j < c.window)
                    and (valid is None or valid[b, j])
                    and (segment is None or segment[b, j] == segment[b, i])
                ]
                if not seen:
                    continue
                score = torch.stack([q[b, i, h] @ k[b, j, h // group] * scale for j in seen])
                if m.sinks is not None:
                    score = torch.cat((score, m.sinks[h].view(1)))
                p = torch.softmax(score, 0)[: len(seen)]
                heads[b, i, h] = sum(w * v[b, j, h // group] for w, j in zip(p, seen))  # type: ignore[assignment]
                if mixed is not None and value is not None:
                    mixed[b, i] += sum(w * value[b, j] for w, j in zip(p, seen)) / m.num_heads
    return m.o(heads.flatten(2)), mixed


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_oracle(name: str) -> None:
    m, x = make(VARIANTS[name]), inputs()
    with torch.no_grad():
        y, state = m(x)
        assert state is None
        assert_close("y", y, oracle(m, x)[0], 1e-6)


@pytest.mark.parametrize("name", ["grouped", "window", "head_norm", "sinks", "sinks_window"])
def test_padding_segments_and_positions(name: str) -> None:
    m, x = make(VARIANTS[name]), inputs()
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[0, :4] = False
    valid[1, 6:] = False
    valid[2, 3] = False
    segment = torch.tensor([[0] * 5 + [1] * 4, [2] * 9, [3, 3, 4, 4, 4, 5, 5, 5, 5]])
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], list(range(9)), [0, 1, 0, 1, 2, 0, 1, 2, 3]])
    signals = Signals(valid=valid.view(-1), segment=segment.view(-1), position=position.view(-1))
    with torch.no_grad():
        y, _ = m(x, signals)
        want, _ = oracle(m, x, valid, segment, position)
        assert bool(torch.isfinite(y).all())
        assert_close("valid tokens", y[valid], want[valid], 1e-6)
        loud = torch.where(valid[..., None], x, 1e3)
        assert_close("padding is not seen", m(loud, signals)[0][valid], y[valid], 1e-12)


def test_fully_masked_rows_have_gradients_without_nan() -> None:
    m, x = make(VARIANTS["grouped"]).float(), inputs().float().requires_grad_()
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[0, :4] = False
    valid[1] = False
    y, _ = m(x, Signals(valid=valid.view(-1)))
    y[valid].sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(y).all())
    assert bool(torch.isfinite(x.grad).all())
    assert not bool(x.grad[~valid].any())


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_equal_the_oracle(name: str) -> None:
    m, x = make(VARIANTS[name]), inputs(5).requires_grad_()
    weight = torch.randn(B, 5, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    named = {"x": x, **dict(m.named_parameters())}
    got = torch.autograd.grad((m(x)[0] * weight).sum(), list(named.values()))
    want = torch.autograd.grad((oracle(m, x)[0] * weight).sum(), list(named.values()))
    for key, g, w in zip(named, got, want):
        assert_close(f"gradient of {key}", g, w, 1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (4, 1, 1, 3), (2, 7)])
@pytest.mark.parametrize("grad", [False, True])
def test_cached_passes_equal_the_whole(name: str, chunks: tuple[int, ...], grad: bool) -> None:
    m, x = make(VARIANTS[name]), inputs()
    with torch.set_grad_enabled(grad):
        want, _ = m(x)
        state, parts = m.new_state(S), []
        for part in x.split(chunks, dim=1):
            y, state = m(part, None, state)
            parts.append(y)
    assert state.length == S
    assert_close("y", torch.cat(parts, 1), want, 1e-6)


@pytest.mark.parametrize("name", ["grouped", "window", "sinks", "sinks_window"])
def test_cached_passes_with_padding_on_the_left(name: str) -> None:
    m, x = make(VARIANTS[name]), inputs()
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[0, :3] = False
    valid[2, :1] = False
    with torch.no_grad():
        want, _ = m(x, Signals(valid=valid.view(-1)))
        for explicit in (True, False):
            state, parts, at = m.new_state(S), [], 0
            for n in (4, 1, 1, 2, 1):
                now = valid[:, at : at + n]
                place = (valid.cumsum(1) - 1).clamp_min(0)[:, at : at + n].reshape(-1)
                signals = Signals(valid=now.reshape(-1), position=place if explicit else None)
                y, state = m(x[:, at : at + n], signals, state)
                parts.append(y)
                at += n
            assert_close("y", torch.cat(parts, 1)[valid], want[valid], 1e-6)


def test_a_sink_is_an_absent_key() -> None:
    """Far below all scores it changes nothing; far above them nothing is seen; the operator's rows lack its share."""
    m, x = make(VARIANTS["sinks"]), inputs()
    without = VARIANTS["sinks"].replace(sinks=False).build(D).double()
    without.load_state_dict({n: t for n, t in m.state_dict().items() if n != "sinks"})
    assert m.sinks is not None
    ones = torch.ones(B * S, 1, dtype=torch.float64)
    with torch.no_grad():
        m.sinks.fill_(-90.0)
        assert_close("a sink far below", m(x)[0], without(x)[0], 1e-12)
        m.sinks.fill_(90.0)
        y, _, attend = m(x, None, None, operator=True)
        assert_close("a sink far above", y, m.o.bias.expand_as(y), 1e-12)
        assert float(attend(ones).max()) < 1e-9
        m.sinks.fill_(0.0)
        m.q.weight.zero_()
        m.q.bias.zero_()
        share = m(x, None, None, operator=True)[2](ones).view(B, S)
        want = torch.arange(1, S + 1, dtype=torch.float64) / torch.arange(2, S + 2, dtype=torch.float64)
        assert_close("n equal keys and a sink", share, want.expand(B, S), 1e-12)


def test_sinks_in_low_precision() -> None:
    m, x = make(VARIANTS["sinks"]), inputs()
    low = make(VARIANTS["sinks"]).to(torch.bfloat16)
    want = m(x)[0]
    assert_close("bf16", low(x.to(torch.bfloat16))[0], want, 2e-2)
    state = low.new_state(S)
    with torch.no_grad():
        parts = []
        for part in x.to(torch.bfloat16).split(1, dim=1):
            y, state = low(part, None, state)
            parts.append(y)
    assert_close("bf16, token by token", torch.cat(parts, 1), want, 2e-2)


def test_the_kernel_gets_no_mask_for_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append(kwargs)
        return kernel(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    m, x = make(VARIANTS["sinks"]), inputs()
    with torch.no_grad():
        _, state = m(x, None, m.new_state(S + 1))
        m(x[:, :1], None, state)
    assert [(c["attn_mask"], c["is_causal"]) for c in calls] == [(None, True)], "one token needs no fused kernel"


def test_a_window_bounds_the_cache() -> None:
    m = make(VARIANTS["window"])
    x = torch.randn(B, 40, D, dtype=torch.float64)
    with torch.no_grad():
        want, _ = m(x)
        state, parts = m.new_state(1000), []
        for t in range(40):
            y, state = m(x[:, t : t + 1], None, state)
            parts.append(y)
            assert state.key is not None
            assert state.key.shape[2] <= 6
    assert_close("y", torch.cat(parts, 1), want, 1e-6)


def test_an_earlier_state_stays_readable() -> None:
    m, x = make(VARIANTS["grouped"]), inputs()
    with torch.no_grad():
        _, first = m(x[:, :4], None, m.new_state(S))
        before = [t.clone() for t in first.seen()]
        m(x[:, 4:], None, first)
        assert all(torch.equal(a, b) for a, b in zip(before, first.seen()))
        assert first.length == 4


def test_cache_errors() -> None:
    k = torch.zeros(2, 1, 5, 4)
    with pytest.raises(UserError, match="holds 4 tokens, 5 are needed"):
        KVCache(capacity=4).extend(k, k)
    with pytest.raises(UserError, match="begun with 2 sequences and now gets 3"):
        KVCache(capacity=9).extend(k, k).extend(torch.zeros(3, 1, 1, 4), torch.zeros(3, 1, 1, 4))
    with pytest.raises(UserError, match="empty"):
        KVCache(capacity=4).seen()


@pytest.mark.parametrize("name", ["grouped", "window", "unscaled"])
@pytest.mark.parametrize("width", [1, 4, 11])
def test_the_operator_is_the_mean_map(name: str, width: int) -> None:
    m, x = make(VARIANTS[name]), inputs()
    v = torch.randn(B, S, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y, _, attend = m(x, None, None, operator=True)
    want_y, want = oracle(m, x, value=v)
    assert want is not None
    assert_close("y", y, want_y, 1e-6)
    assert_close("A v", attend(v.view(B * S, width)), want.view(B * S, width), 1e-6)
    ones = attend(torch.ones(B * S, width, dtype=torch.float64))
    assert_close("rows of A sum to one", ones, torch.ones_like(ones), 1e-9)


def test_the_operator_in_cached_passes() -> None:
    m, x = make(VARIANTS["grouped"]), inputs()
    v = torch.randn(B, S, 5, dtype=torch.float64)
    with torch.no_grad():
        _, _, attend = m(x, None, None, operator=True)
        want = attend(v.view(B * S, 5)).view(B, S, 5)
        _, state, _ = m(x[:, :6], None, m.new_state(S), operator=True)
        _, state, attend = m(x[:, 6:], None, state, operator=True)
        assert_close("A v of the new tokens", attend(v.view(B * S, 5)).view(B, 3, 5), want[:, 6:], 1e-6)
        with pytest.raises(UserError, match="N >= 9"):
            attend(v[:, 6:].reshape(-1, 5))


def test_the_kernel_needs_no_mask_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append(kwargs)
        return kernel(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    m, x = make(VARIANTS["grouped"]), inputs()
    _, state, _ = m(x, None, m.new_state(S + 1), operator=True)
    assert len(calls) == 1, "the operator costs nothing until it is called"
    m(x[:, :1], None, state)
    assert [c["attn_mask"] for c in calls] == [None, None]
    assert [c["is_causal"] for c in calls] == [True, False]


def test_impossible_settings() -> None:
    with pytest.raises(UserError, match="no multiple of num_kv_heads"):
        Attention(num_heads=4, num_kv_heads=3)
    with pytest.raises(UserError, match="no multiple of num_heads"):
        Attention(num_heads=5).build(24)
    with pytest.raises(UserError, match="window"):
        Attention(window=0)
    m = make(VARIANTS["plain"])
    with pytest.raises(UserError, match=r"Signals.valid has 9 entries for 3 x 9"):
        m(inputs(), Signals(valid=torch.ones(9, dtype=torch.bool)))
