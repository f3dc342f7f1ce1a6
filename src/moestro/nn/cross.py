"""Attention of one sequence to another: a decoder's look at what an encoder made."""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.draws import fold
from ..core.errors import UserError
from ..core.pytree import pytree
from ..core.signals import Signals
from . import dropped
from .config import CrossAttention as CrossAttentionConfig
from .config import RMSNorm as RMSNormConfig
from .linear import products
from .norm import RMSNorm

__all__ = ["CrossAttention", "CrossCache", "Memory"]


@pytree
@dataclasses.dataclass(frozen=True)
class Memory:
    """What an encoder made of a batch of sequences. states: [B, N, D']. valid: [B, N] bool or None, False = padding."""

    states: Tensor
    valid: Tensor | None = None


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossCache:
    """Keys and values of a memory, computed once: key, value [B, H', N, d], None before. valid: [B, N] bool or None."""

    key: Tensor | None = None
    value: Tensor | None = None
    valid: Tensor | None = None


class CrossAttention(nn.Module):
    """Grouped-query attention to a memory: `(x, memory, state) -> (y, state)`.

    Shapes: x [B, S, D], memory of N units [B, N, D'] -> y [B, S, D]. Padding of the memory is seen by nobody; a
    sequence whose memory is all padding gets a finite y that means nothing. state None = nothing is kept; `new_state()`
    starts a cache, and a filled one stands in for the memory, which is not looked at again. signals: of x, for adapted
    maps that look at them, and for the draws of dropout.
    """

    role = "attention"

    def __init__(self, config: CrossAttentionConfig, dim: int, source_dim: int | None = None) -> None:
        super().__init__()
        shape = config.attention()
        source_dim = dim if source_dim is None else source_dim
        self.config = config
        self.num_heads = shape.num_heads
        self.num_kv_heads = shape.num_kv_heads or shape.num_heads
        self.head_dim = shape.width(dim)
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = config.bias != "none"
        self.q = nn.Linear(dim, wide, bias=bias)
        self.k = nn.Linear(source_dim, narrow, bias=bias)
        self.v = nn.Linear(source_dim, narrow, bias=bias)
        self.o = nn.Linear(wide, dim, bias=config.bias == "all")
        norm = RMSNormConfig(eps=config.norm_eps)
        self.q_norm = RMSNorm(norm, self.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(norm, self.head_dim) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        memory: Memory | None = None,
        state: CrossCache | None = None,
        signals: Signals | None = None,
    ) -> tuple[Tensor, CrossCache | None]:
        B, S, _ = x.shape
        seen = state if state is not None and state.key is not None else self._read(memory)
        key, value, valid = seen.key, seen.value, seen.valid
        assert key is not None
        assert value is not None
        if key.shape[0] != B:
            raise UserError(f"cross-attention: a memory of {key.shape[0]} sequences for {B}; give every row its own")
        q = products(x, self.q, signals=signals)[0].view(B, S, self.num_heads, self.head_dim)
        q = (q if self.q_norm is None else self.q_norm(q)).transpose(1, 2)
        mask = None if valid is None else (valid | ~valid.any(1, keepdim=True))[:, None, None]
        grouped = self.num_kv_heads != self.num_heads
        scale, share = self.config.scale, self.config.dropout
        if share and self.training:
            units = dropped.unit_ids(signals, B, S, 0, x.device)
            seed = fold(0 if signals is None else signals.seed, "dropout.cross_attention")
            y = dropped.attend(q, key, value, share, seed, units, mask, scale)
        else:
            y = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
        (y,) = products(y.transpose(1, 2).reshape(B, S, self.num_heads * self.head_dim), self.o, signals=signals)
        return y, None if state is None else seen

    def _read(self, memory: Memory | None) -> CrossCache:
        if memory is None:
            raise UserError("cross-attention: there is neither a memory nor a filled cache; pass what the encoder made")
        k, v = products(memory.states, self.k, self.v)
        k, v = (t.unflatten(2, (self.num_kv_heads, self.head_dim)) for t in (k, v))
        k = k if self.k_norm is None else self.k_norm(k)
        return CrossCache(key=k.transpose(1, 2), value=v.transpose(1, 2), valid=memory.valid)

    def new_state(self) -> CrossCache:
        """An empty cache."""
        return CrossCache()

    def extra_flops(self, seq_len: int) -> int:
        """Forward FLOPs per token of scores and of their product with the values, for a memory of `seq_len` units."""
        return 4 * self.num_heads * self.head_dim * seq_len

    def extra_backward_flops(self, seq_len: int) -> int:
        """What a backward pass costs beyond two forward passes: the scores are computed again; with dropout, the
        plain path keeps them."""
        return 0 if self.config.dropout else self.extra_flops(seq_len) // 2
