"""Latent attention against a float64 oracle that writes out every score, its cache and its absorbed passes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moestro.core.account import cost
from moestro.core.errors import UserError
from moestro.core.params import describe
from moestro.core.signals import Signals
from moestro.nn import Attention, LatentAttention, Rotary, YaRN
from moestro.nn.latent import LatentAttention as LatentModule
from moestro.testing.compare import assert_close

B, S, D = 3, 9, 24
YARN = YaRN(factor=8.0, original_context=4, mscale=0.7, mscale_all_dim=1.3, as_released=True)
PLAIN = LatentAttention(num_heads=3, kv_rank=10, nope_dim=5, rope_dim=4, value_dim=7)

VARIANTS = {
    "plain": PLAIN,
    "compressed_queries": PLAIN.replace(q_rank=8, bias=True),
    "half": PLAIN.replace(positions=Rotary(base=100.0)),
    "yarn": PLAIN.replace(positions=Rotary(style="interleaved", scaling=YARN)),
    "wide_values": PLAIN.replace(value_dim=13, scale=0.7),
    "wide_heads": PLAIN.replace(nope_dim=20, value_dim=3, q_rank=6),
}


def make(config: LatentAttention) -> LatentModule:
    torch.manual_seed(0)
    module = config.build(D)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.double()


def inputs(n: int = S) -> Tensor:
    return torch.randn(B, n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rms(t: Tensor, gain: Tensor) -> Tensor:
    return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def rotated(t: Tensor, position: Tensor, config: Rotary) -> Tensor:
    """t [B, n, d] float64, pair by pair, as complex numbers."""
    from moestro.nn.rotary import frequencies

    theta, factor = frequencies(config, t.shape[-1])
    half = t.shape[-1] // 2
    out = torch.zeros_like(t)
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if config.style == "interleaved" else (j, j + half)
        angle = position.double() * theta[j]
        out = out.index_add(-1, torch.tensor([a]), (t[..., a] * angle.cos() - t[..., b] * angle.sin())[..., None])
        out = out.index_add(-1, torch.tensor([b]), (t[..., b] * angle.cos() + t[..., a] * angle.sin())[..., None])
    return out * factor


def oracle(
    m: LatentModule,
    x: Tensor,
    valid: Tensor | None = None,
    segment: Tensor | None = None,
    position: Tensor | None = None,
    value: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Query by query, head by head. With `value` [B, S, C] also the mean over heads of the map times it."""
    c, n = m.config, x.shape[1]
    position = torch.arange(n).expand(B, n) if position is None else position
    queries = m.q(x) if c.q_rank is None else m.q_up(rms(m.q_down(x), m.q_norm.weight))
    down = m.kv_down(x)
    latent = rms(down[..., : c.kv_rank], m.kv_norm.weight)
    shared = rotated(down[..., c.kv_rank :], position, c.positions)
    scale = c.scale
    if scale is None:
        scale = 1 / math.sqrt(c.nope_dim + c.rope_dim)
        if c.positions.scaling is not None:
            scale *= (0.1 * 1.3 * math.log(8.0) + 1) ** 2
    outputs = []
    mixed = None if value is None else torch.zeros_like(value)
    for h in range(c.num_heads):
        wide = c.nope_dim + c.rope_dim
        mine = queries[..., h * wide : (h + 1) * wide]
        q = torch.cat((mine[..., : c.nope_dim], rotated(mine[..., c.nope_dim :], position, c.positions)), -1)
        weight = m.kv_up.weight[h * (c.nope_dim + c.value_dim) : (h + 1) * (c.nope_dim + c.value_dim)]
        k = torch.cat((latent @ weight[: c.nope_dim].T, shared), -1)
        v = latent @ weight[c.nope_dim :].T
        rows = []
        for b in range(B):
            for i in range(n):
                seen = [
                    j
                    for j in range(i + 1)
                    if (valid is None or valid[b, j]) and (segment is None or segment[b, j] == segment[b, i])
                ]
                if not seen:
                    rows.append(torch.zeros(c.value_dim, dtype=x.dtype))
                    continue
                p = torch.softmax(torch.stack([q[b, i] @ k[b, j] * scale for j in seen]), 0)
                rows.append(sum(w * v[b, j] for w, j in zip(p, seen)))  # type: ignore[arg-type]
                if mixed is not None and value is not None:
                    mixed[b, i] += sum(w * value[b, j] for w, j in zip(p, seen)) / c.num_heads
        outputs.append(torch.stack(rows).view(B, n, -1))
    return m.o(torch.cat(outputs, -1)), mixed


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_oracle_with_gradients(name: str) -> None:
    m, x = make(VARIANTS[name]), inputs(6).requires_grad_()
    y, state = m(x)
    assert state is None
    want, _ = oracle(m, x)
    assert_close("y", y, want, 1e-6)
    weight = torch.randn(B, 6, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    named = {"x": x, **dict(m.named_parameters())}
    got = torch.autograd.grad((y * weight).sum(), list(named.values()))
    exact = torch.autograd.grad((want * weight).sum(), list(named.values()))
    for key, g, w in zip(named, got, exact):
        assert_close(f"gradient of {key}", g, w, 1e-5)


def test_padding_segments_and_positions() -> None:
    m, x = make(VARIANTS["yarn"]), inputs()
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


@pytest.mark.parametrize("absorbs", [False, True])
def test_both_ways_with_a_cache_are_equal(absorbs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = make(VARIANTS["compressed_queries"]), inputs()
    monkeypatch.setattr(m, "_absorbs", lambda queries: absorbs)
    calls: list[int] = []
    monkeypatch.setattr(m, "_absorbed", lambda *a: (calls.append(1), LatentModule._absorbed(m, *a))[1])
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[0, :3] = False
    want, _ = oracle(m, x, valid)
    _, state = m(x[:, :4], Signals(valid=valid[:, :4].reshape(-1)), m.new_state(S))
    y, state = m(x[:, 4:8], None, state)
    last, _ = m(x[:, 8:], None, state)
    assert len(calls) == 2 * absorbs
    assert_close("y", torch.cat((y, last), 1), want[:, 4:], 1e-6)
    named = dict(m.named_parameters())
    weight = torch.randn(B, 5, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = torch.autograd.grad((torch.cat((y, last), 1) * weight).sum(), list(named.values()))
    exact = torch.autograd.grad((want[:, 4:] * weight).sum(), list(named.values()))
    for key, g, w in zip(named, got, exact):
        assert_close(f"gradient of {key}", g, w, 1e-5)


def test_few_tokens_absorb_and_many_do_not() -> None:
    v3 = LatentAttention(num_heads=2, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    m = v3.build(16)
    assert m._absorbs(1)
    assert m._absorbs(128)
    assert not m._absorbs(4096)
    m.kv_up.register_forward_hook(lambda *a: None)
    assert not m._absorbs(1), "whoever watches kv_up sees it called"


def test_an_adapted_map_is_called_when_decoding() -> None:
    class Doubled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    m, x = make(PLAIN), inputs()
    m.kv_up = Doubled(m.kv_up)  # type: ignore[assignment]
    with torch.no_grad():
        want, _ = m(x)
        _, state = m(x[:, :8], None, m.new_state(S))
        assert_close("y", m(x[:, 8:], None, state)[0], want[:, 8:], 1e-6)


def test_the_cache_holds_compressed_numbers_only() -> None:
    config = LatentAttention(num_heads=4, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16)
    m, x = config.build(D), torch.randn(2, 5, D)
    with torch.no_grad():
        _, state = m(x, None, m.new_state(10))
        full = Attention(num_heads=4, head_dim=24).build(D)
        _, other = full(x, None, full.new_state(10))
    assert state.nbytes == 2 * 10 * 4 * config.cache_width == 2 * 10 * 4 * 40
    assert other.nbytes == 2 * 10 * 4 * 2 * 4 * 24
    assert LatentAttention(num_heads=128, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128).cache_width == 576


def test_the_operator_is_the_mean_map() -> None:
    for name in ("plain", "wide_values"):
        m, x = make(VARIANTS[name]), inputs()
        v = torch.randn(B, S, 11, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        _, want = oracle(m, x, value=v)
        assert want is not None
        with torch.no_grad():
            _, _, attend = m(x, None, None, operator=True)
            assert_close("A v", attend(v.view(B * S, 11)).view(B, S, 11), want, 1e-6)
            _, state, _ = m(x[:, :6], None, m.new_state(S), operator=True)
            for n in (2, 1):
                at = state.length
                _, state, attend = m(x[:, at : at + n], None, state, operator=True)
                got = attend(v[:, : at + n].reshape(-1, 11)).view(B, n, 11)
                assert_close("A v of the new tokens", got, want[:, at : at + n], 1e-6)
            with pytest.raises(UserError, match="N >= 9"):
                attend(v[:, 6:].reshape(-1, 11))


def test_low_precision_stays_close() -> None:
    m, x = make(VARIANTS["compressed_queries"]).float(), inputs().float()
    with torch.no_grad():
        want, _ = m(x)
        low = m.to(torch.bfloat16)
        _, state = low(x[:, :6].bfloat16(), None, low.new_state(S))
        y, _ = low(x[:, 6:].bfloat16(), None, state)
    assert y.dtype == torch.bfloat16
    assert_close("y", y, want[:, 6:], 3e-2)


def test_counts_and_roles() -> None:
    config = VARIANTS["compressed_queries"]
    m = config.build(D)
    r, n = 8, config.num_heads
    matrices = D * r + r * n * 9 + D * 14 + 10 * n * 12 + n * 7 * D
    assert cost(m).params == matrices + r + 10 + (r + 14 + D)
    assert cost(m, 5).flops == 2 * matrices + 4 * n * 9 * 5
    assert {i.role for i in describe(m).values()} == {"attention", "norm"}
    assert describe(m)["kv_norm.weight"].ones


def test_impossible_settings() -> None:
    with pytest.raises(UserError, match=r"LatentAttention.rope_dim must be at least 1"):
        LatentAttention(rope_dim=0)
    with pytest.raises(UserError, match=r"LatentAttention.q_rank must be positive"):
        LatentAttention(q_rank=0)
    with pytest.raises(UserError, match="no even number"):
        LatentAttention(rope_dim=3).build(D)
    m = make(PLAIN)
    with pytest.raises(UserError, match=r"Signals.valid has 9 entries for 3 x 9"):
        m(inputs(), Signals(valid=torch.ones(9, dtype=torch.bool)))
    with pytest.raises(UserError, match="holds 4 tokens, 9 are needed"):
        m(inputs(), None, m.new_state(4))
