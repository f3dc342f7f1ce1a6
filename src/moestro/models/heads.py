"""Heads on encoders: spans of a text, classes of texts, embeddings of texts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core.account import Cost
from ..nn.config import LayerNorm as LayerNormConfig
from . import heads_config as cfg

__all__ = ["ClassHead", "EmbeddingHead", "SpanHead", "pooled"]


def pooled(h: Tensor, valid: Tensor | None, how: str) -> Tensor:
    """[B, D], the mean of each text's tokens or its first token; zeros for a text of padding only.

    Shapes: h [B, S, D], valid [B, S] bool or None. Padding, on whichever side, has no influence.
    """
    if how == "first":
        if valid is None:
            return h[:, 0]
        first = valid.to(torch.uint8).argmax(1)
        found = h.gather(1, first[:, None, None].expand(-1, 1, h.shape[2]))[:, 0]
        return found.masked_fill(~valid.any(1, keepdim=True), 0)
    if valid is None:
        return h.mean(1)
    return h.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)


class SpanHead(nn.Module):
    """`(h [B, S, D], valid) -> [B, S, 2]`, logits of beginning and end. Source: Devlin et al. 2018, section 4.2; 13."""

    role = "head"

    def __init__(self, config: cfg.SpanHead, dim: int) -> None:
        super().__init__()
        self.config = config
        self.map = nn.Linear(dim, 2)

    def forward(self, h: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.map(h)


class _PerText(nn.Module):
    """A head that runs once per text: its FLOPs are spread over the text's tokens, rounded down."""

    role = "head"

    def cost(self, seq_len: int = 1) -> Cost:
        params = sum(p.numel() for p in self.parameters())
        flops = sum(2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return Cost(params, params, flops // seq_len)


class ClassHead(_PerText):
    """`(h [B, S, D], valid) -> [B, C]`, logits of classes: a linear map of the pooled hidden states."""

    def __init__(self, config: cfg.ClassHead, dim: int) -> None:
        super().__init__()
        self.config = config
        self.map = nn.Linear(dim, config.num_classes)

    def forward(self, h: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.map(pooled(h, valid, self.config.pooling))


class EmbeddingHead(_PerText):
    """`(h [B, S, D], valid) -> [B, D]`: second(tanh(first(norm(pooled h)))), times temperature ** -0.5 if that is
    learned, so that inner products are divided by it. Source: pooler of 34 (arXiv 2401.15713)."""

    def __init__(self, config: cfg.EmbeddingHead, dim: int) -> None:
        super().__init__()
        self.config = config
        self.norm = LayerNormConfig().build(dim)
        self.first = nn.Linear(dim, dim)
        self.second = nn.Linear(dim, dim)
        self.log_temperature: nn.Parameter | None = None
        if config.temperature is not None:
            self.log_temperature = nn.Parameter(torch.full((1,), math.log(config.temperature)))

    def forward(self, h: Tensor, valid: Tensor | None = None) -> Tensor:
        y = self.second(torch.tanh(self.first(self.norm(pooled(h, valid, self.config.pooling)))))
        return y if self.log_temperature is None else y * torch.exp(-self.log_temperature / 2).to(y.dtype)
