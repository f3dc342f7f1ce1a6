"""What each head adds to an attention's output, and means over heads with weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moestro.nn.config import Attention, LatentAttention
from moestro.nn.operator import by_head

B, S, D = 2, 5, 12
LATENT = LatentAttention(num_heads=3, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=5, bias=True)
KINDS = {"bias": Attention(num_heads=4, num_kv_heads=2, head_dim=4, bias="all"), "latent": LATENT}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    mixer = KINDS[name].build(D).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn(p.shape, generator=draws, dtype=p.dtype) * 0.5)
    return mixer, torch.randn(B, S, D, generator=draws, dtype=torch.float64)


@pytest.mark.parametrize("name", KINDS)
def test_contributions_of_heads_sum_to_the_output(name: str) -> None:
    mixer, x = made(name)
    y, _, attend = mixer(x, None, None, operator=True)
    parts = attend.contributions()
    assert parts.shape == (B * S, KINDS[name].num_heads, D)
    torch.testing.assert_close(parts.sum(1) + mixer.o.bias, y.view(B * S, D))


@pytest.mark.parametrize("name", KINDS)
def test_a_mean_with_weights(name: str) -> None:
    """Equal weights are the plain mean; all of the weight on one head is that head's map; both mixed are linear."""
    mixer, x = made(name)
    attend = mixer(x, None, None, operator=True)[2]
    H, v = KINDS[name].num_heads, torch.randn(B * S, 3, dtype=torch.float64)
    torch.testing.assert_close(attend(v, torch.full((B * S, H), 1 / H, dtype=torch.float64)), attend(v))
    one = [attend(v, torch.eye(H, dtype=torch.float64)[h].expand(B * S, H)) for h in range(H)]
    torch.testing.assert_close(torch.stack(one).mean(0), attend(v))
    share = torch.rand(B * S, H, dtype=torch.float64)
    torch.testing.assert_close(attend(v, share), sum(share[:, h, None] * one[h] for h in range(H)))


@pytest.mark.parametrize("name", KINDS)
def test_the_same_token_by_token(name: str) -> None:
    mixer, x = made(name)
    mixer, x = mixer.float(), x.float()
    with torch.no_grad():
        want = mixer(x, None, None, operator=True)[2].contributions().view(B, S, -1, D)
        state = mixer.new_state(S)
        for t in range(S):
            _, state, attend = mixer(x[:, t : t + 1], None, state, operator=True)
            torch.testing.assert_close(attend.contributions(), want[:, t], rtol=1e-4, atol=1e-5)


def test_an_output_map_of_another_kind() -> None:
    """A map that is no plain linear one is asked with one head at a time."""
    y, plain = torch.randn(B, S, 4, 3), nn.Linear(12, 7)
    torch.testing.assert_close(by_head(y, nn.Sequential(plain)), by_head(y, plain))
