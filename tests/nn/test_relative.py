"""Relative position bias, attention in both directions and to another sequence: oracles write out every score."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.nn import Attention, CrossAttention, RelativeBias
from moestro.nn.cross import Memory
from moestro.nn.relative import bucket
from moestro.testing.compare import assert_close

B, S, N, D = 3, 7, 5, 16


def noisy(module: torch.nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return module.double()


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bucket_by_hand(distance: int, buckets: int, most: int, causal: bool) -> int:
    """One distance, in Python's floats."""
    first = 0
    if causal:
        away = max(0, -distance)
    else:
        buckets //= 2
        first = buckets if distance > 0 else 0
        away = abs(distance)
    exact = buckets // 2
    if away < exact:
        return first + away
    grown = exact + int(math.log(away / exact) / math.log(most / exact) * (buckets - exact))
    return first + min(grown, buckets - 1)


@pytest.mark.parametrize("causal", [True, False])
def test_buckets(causal: bool) -> None:
    distance = torch.arange(-300, 301)
    got = bucket(distance, 32, 128, causal)
    want = [bucket_by_hand(d, 32, 128, causal) for d in distance.tolist()]
    wrong = [d for d, a, b in zip(distance.tolist(), got.tolist(), want) if a != b]
    # where the logarithm comes out whole, fp32 (as released models have it) and Python's floats may differ by a step
    assert all(abs(d) in (16, 32, 64, 128) for d in wrong), wrong
    assert int(got.max()) == 31
    assert int(got.min()) == 0
    near = bucket(torch.arange(-3, 4), 32, 128, causal).tolist()
    assert near == ([3, 2, 1, 0, 0, 0, 0] if causal else [3, 2, 1, 0, 17, 18, 19])


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 6), (1, 9), (3, 9)])
@pytest.mark.parametrize("causal", [True, False])
def test_bias_of_every_pair(queries: int, keys: int, causal: bool) -> None:
    config = RelativeBias(buckets=8, max_distance=6)
    m = noisy(config.build(2, causal))
    got = m(queries, keys)
    assert got.shape == (1, 2, queries, keys)
    for i in range(queries):
        for j in range(keys):
            at = bucket_by_hand(j - (keys - queries + i), 8, 6, causal)
            assert torch.equal(got[0, :, i, j], m.table[at]), (i, j)
    weight = rand(*got.shape)
    (got * weight).sum().backward()
    want = torch.zeros_like(m.table)
    for i in range(queries):
        for j in range(keys):
            want[bucket_by_hand(j - (keys - queries + i), 8, 6, causal)] += weight[0, :, i, j]
    assert_close("gradient of the table", m.table.grad, want, 1e-12)


def softmax_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, seen: Tensor) -> Tensor:
    """q [B, S, H, d], k, v [B, N, G, d], bias [H, S, N], seen [B, S, N] -> [B, S, H, d], one query at a time."""
    out = []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                score = k[b, :, g] @ q[b, i, h] * scale
                score = score if bias is None else score + bias[h, i]
                p = torch.softmax(score[seen[b, i]], 0)
                out.append(p @ v[b, seen[b, i], g])
    return torch.stack(out).view(*q.shape)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", ["none", "own", "given", "both"])
@pytest.mark.parametrize("padded", [False, True])
def test_attention(causal: bool, bias: str, padded: bool) -> None:
    own = RelativeBias(buckets=8, max_distance=6) if bias in ("own", "both") else None
    config = Attention(num_heads=4, num_kv_heads=2, scale=1.0, causal=causal, positions=own)
    m = noisy(config.build(D))
    x = rand(B, S, D).requires_grad_()
    given = rand(1, 4, S, S + 2, seed=3).requires_grad_() if bias in ("given", "both") else None
    valid = torch.ones(B, S, dtype=torch.bool)
    if padded:
        valid[0, :2] = False
        valid[1, 5:] = False
    y, state = m(x, Signals(valid=valid.view(-1)) if padded else None, bias=given)
    assert state is None
    seen = valid[:, None].expand(B, S, S).clone()
    seen |= torch.eye(S, dtype=torch.bool)
    if causal:
        seen &= torch.ones(S, S, dtype=torch.bool).tril()
    total = None
    if own is not None:
        total = m.relative(S, S)[0]
    if given is not None:
        total = given[0, :, :, -S:] if total is None else total + given[0, :, :, -S:]
    q, k, v = (f(x).view(B, S, -1, 4) for f in (m.q, m.k, m.v))
    want = m.o(softmax_rows(q, k, v, 1.0, total, seen).flatten(2))
    assert_close("y", y[valid], want[valid], 1e-6)
    leaves = [x, *m.parameters(), *([] if given is None else [given])]
    target = torch.sin(torch.arange(D, dtype=torch.float64))
    grads = torch.autograd.grad((y * target * valid[..., None]).sum(), leaves)
    wants = torch.autograd.grad((want * target * valid[..., None]).sum(), leaves)
    for i, (a, b) in enumerate(zip(grads, wants)):
        assert_close(f"gradient {i}", a, b, 1e-6)


def test_cached_attention_with_a_bias() -> None:
    m = noisy(Attention(num_heads=2, positions=RelativeBias(buckets=8, max_distance=6), window=4).build(D))
    x, given = rand(B, S, D), rand(1, 2, S, S)
    with torch.no_grad():
        want, _ = m(x, bias=given)
        state, parts = m.new_state(S), []
        for t in range(S):
            y, state = m(x[:, t : t + 1], None, state, bias=given[:, :, t : t + 1, : t + 1])
            parts.append(y)
    assert_close("y", torch.cat(parts, 1), want, 1e-12)


def test_packed_sequences_in_both_directions() -> None:
    m = noisy(Attention(num_heads=2, causal=False, positions=RelativeBias(buckets=8, max_distance=6)).build(D))
    x = rand(1, S, D)
    segment = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    y, _ = m(x, Signals(segment=segment))
    assert_close("first", y[:, :3], m(x[:, :3])[0], 1e-12)
    assert_close("second", y[:, 3:], m(x[:, 3:])[0], 1e-12)


def test_operator_in_both_directions() -> None:
    m = noisy(Attention(num_heads=2, causal=False, positions=RelativeBias(buckets=8, max_distance=6)).build(D))
    x = rand(B, S, D)
    _, _, attend = m(x, None, None, True)
    rows = attend(torch.eye(S, dtype=torch.float64).repeat(B, 1)).view(B, S, S)
    assert_close("rows of a map", rows.sum(-1), torch.ones(B, S), 1e-12)
    assert bool((rows > 0).all())


def test_a_cache_needs_causal_attention() -> None:
    m = noisy(Attention(num_heads=2, causal=False).build(D))
    with pytest.raises(UserError, match="a cache is for causal attention"):
        m(rand(B, 1, D), None, m.new_state(4))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention(norm: bool, padded: bool) -> None:
    config = CrossAttention(num_heads=4, num_kv_heads=2, qk_norm=norm, bias="all")
    m = noisy(config.build(D, 10))
    x, source = rand(B, S, D), rand(B, N, 10, seed=2)
    valid = torch.ones(B, N, dtype=torch.bool)
    if padded:
        valid[0, 3:] = False
        valid[1, :1] = False
    y, none = m(x, Memory(source, valid if padded else None))
    assert none is None
    q, k, v = m.q(x).view(B, S, 4, 4), m.k(source).view(B, N, 2, 4), m.v(source).view(B, N, 2, 4)
    if norm:
        q, k = m.q_norm(q), m.k_norm(k)
    want = m.o(softmax_rows(q, k, v, 0.5, None, valid[:, None].expand(B, S, N)).flatten(2))
    assert_close("y", y, want, 1e-6)

    first, state = m(x[:, :4], Memory(source, valid if padded else None), m.new_state())
    rest, again = m(x[:, 4:], None, state)
    assert_close("with a cache", torch.cat((first, rest), 1), y, 1e-12)
    assert again is state, "keys and values are computed once"
    loud = torch.where(valid[..., None], source, 1e3)
    if padded:
        assert_close("padding is not seen", m(x, Memory(loud, valid))[0], y, 1e-12)


def test_cross_attention_needs_something_to_look_at() -> None:
    m = noisy(CrossAttention(num_heads=2).build(D))
    with pytest.raises(UserError, match="neither a memory nor a filled cache"):
        m(rand(B, S, D), None, m.new_state())
    with pytest.raises(UserError, match="a memory of 2 sequences for 3"):
        m(rand(B, S, D), Memory(rand(2, N, D)))
    nothing = torch.zeros(B, N, dtype=torch.bool)
    assert bool(torch.isfinite(m(rand(B, S, D), Memory(rand(B, N, D), nothing))[0]).all())
