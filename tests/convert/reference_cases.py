"""A decoder of Llama's kind in float64, written out from its published tensors: nothing of the library is used."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["draw", "llama_like", "swiglu"]

Weights = dict[str, Tensor]


def draw(generator: torch.Generator, *shape: int, around: float = 0.0) -> Tensor:
    return around + 0.3 * torch.randn(shape, generator=generator)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = x @ gate.T
    return (hidden / (1 + torch.exp(-hidden)) * (x @ up.T)) @ down.T


def llama_like(
    weights: Weights,
    tokens: Tensor,
    *,
    layers: int,
    heads: int,
    eps: float,
    norms: tuple[str, str],
    ffn: Callable[[Weights, int, Tensor], Tensor],
    base: float = 10_000.0,
) -> Tensor:
    """Logits [S, V] of one sequence. norms: names before attention and before the FFN. ffn: (weights, layer, x)."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    h = w["model.embed_tokens.weight"][tokens]
    for i in range(layers):
        at = f"model.layers.{i}."
        x = _norm(h, w[f"{at}{norms[0]}.weight"], eps)
        h = h + _attention(x, {n: w[f"{at}self_attn.{n}_proj.weight"] for n in "qkvo"}, heads, base)
        h = h + ffn(w, i, _norm(h, w[f"{at}{norms[1]}.weight"], eps))
    return _norm(h, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def _attention(x: Tensor, w: dict[str, Tensor], heads: int, base: float) -> Tensor:
    S, D = x.shape
    d = D // heads
    angle = torch.arange(S).double()[:, None] / base ** (torch.arange(0, d, 2).double() / d)

    def turned(y: Tensor) -> Tensor:
        """[S, d]: the pairs (i, i + d/2) rotated by position times frequency i."""
        a, b = y[:, : d // 2], y[:, d // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1)

    out = []
    for n in range(heads):
        q, k, v = ((x @ w[name].T)[:, n * d : (n + 1) * d] for name in "qkv")
        scores = turned(q) @ turned(k).T / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), float("-inf"))
        out.append(torch.softmax(scores, dim=-1) @ v)
    return torch.cat(out, dim=1) @ w["o"].T
