"""Causal attention over compressed keys and values."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.signals import Signals
from .cache import KVCache
from .config import LatentAttention as LatentAttentionConfig
from .config import RMSNorm as RMSNormConfig
from .config import YaRN
from .linear import products
from .mask import kernel_mask, per_row
from .norm import RMSNorm
from .operator import Kernel, Operator, by_head, mean_map

__all__ = ["LatentAttention"]


class LatentAttention(nn.Module):
    """Multi-head latent attention: `(x, signals, state) -> (y, state)`.

    c = norm(W_DKV x) [r] and k_R = rotate(W_KR x) [d_r] are all that is kept of a token. Head i has the key
    [W_UK_i c | k_R], the value W_UV_i c and the query [W_UQ_i c_Q | rotate(W_QR_i c_Q)] with c_Q = norm(W_DQ x), or x
    itself without q_rank. Source: DeepSeek-V2, arXiv 2405.04434 eqs. 9-19; DeepSeek-V3, arXiv 2412.19437 eqs. 1-11.

    Shapes and signals: those of `nn.attention.Attention`. q [H (d_n + d_r), D], or q_down [r', D] and q_up
    [H (d_n + d_r), r']; kv_down [r + d_r, D], k_R last; kv_up [H (d_n + d_v), r], of each head the key first;
    o [D, H d_v].

    State: a `KVCache` with key [B, 1, C, r + d_r], which is [c | k_R], and value [B, 1, C, 0]: its bytes per token are
    r + d_r times those of a number. Where few tokens meet a cache, W_UK is multiplied into their queries and W_UV into
    their outputs, and the cache is one key head that is its own value (absorbed decoding); otherwise, and where
    `kv_up` is adapted, wrapped or watched, keys and values of all heads are made from it.
    """

    role = "attention"
    offers_operator = True

    def __init__(self, config: LatentAttentionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        self.head_dim = config.nope_dim + config.rope_dim
        wide = config.num_heads * self.head_dim
        norm = RMSNormConfig(eps=config.norm_eps)
        if config.q_rank is None:
            self.q = nn.Linear(dim, wide, bias=False)
        else:
            self.q_down = nn.Linear(dim, config.q_rank, bias=config.bias)
            self.q_norm = RMSNorm(norm, config.q_rank)
            self.q_up = nn.Linear(config.q_rank, wide, bias=False)
        self.kv_down = nn.Linear(dim, config.kv_rank + config.rope_dim, bias=config.bias)
        self.kv_norm = RMSNorm(norm, config.kv_rank)
        self.kv_up = nn.Linear(config.kv_rank, config.num_heads * (config.nope_dim + config.value_dim), bias=False)
        self.o = nn.Linear(config.num_heads * config.value_dim, dim, bias=config.bias)
        self.positions = config.positions.build(config.rope_dim)
        self.scale = _scale(config)

    @overload
    def forward(
        self, x: Tensor, signals: Signals | None = None, state: KVCache | None = None, operator: Literal[False] = False
    ) -> tuple[Tensor, KVCache | None]: ...

    @overload
    def forward(
        self, x: Tensor, signals: Signals | None, state: KVCache | None, operator: Literal[True]
    ) -> tuple[Tensor, KVCache | None, Operator]: ...

    def forward(
        self, x: Tensor, signals: Signals | None = None, state: KVCache | None = None, operator: bool = False
    ) -> tuple[Tensor, KVCache | None] | tuple[Tensor, KVCache | None, Operator]:
        B, S, _ = x.shape
        valid, position, segment = per_row(signals, B, S)
        q, latent = self._projected(x, position, 0 if state is None else state.length, signals)

        fresh = state is None or state.length == 0
        key_valid, key_segment = valid, segment
        if state is not None:
            state = state.extend(latent, latent[..., :0], valid, segment)
            if not fresh:
                latent, _ = state.seen()
                key_valid, key_segment = state.marks()
        mask, causal = kernel_mask(S, latent.shape[2], None, key_valid, key_segment, segment, x.device)
        if not fresh and self._absorbs(S):
            q, k, v, out = self._absorbed(q, latent)
        else:
            q, k, v, out = self._expanded(q, latent, signals if fresh else None)
        heads = out(self._attend(q, k, v, mask, causal)).transpose(1, 2)
        (y,) = products(heads.reshape(B, S, -1), self.o, signals=signals)
        if not operator:
            return y, state
        kernel = partial(self._attend, q, k, mask=mask, causal=causal)
        return y, state, mean_map(kernel, q, k, partial(by_head, heads, self.o))

    def _projected(
        self, x: Tensor, position: Tensor | None, start: int, signals: Signals | None
    ) -> tuple[Tensor, Tensor]:
        """q [B, H, S, d_n + d_r] and [c | k_R] [B, 1, S, r + d_r], normed and rotated."""
        c = self.config
        if c.q_rank is None:
            q, both = products(x, self.q, self.kv_down, signals=signals)
        else:
            q, both = products(x, self.q_down, self.kv_down, signals=signals)
            (q,) = products(self.q_norm(q), self.q_up, signals=signals)
        q = q.unflatten(2, (self.num_heads, self.head_dim))
        q_plain, q_turned = q.split((c.nope_dim, c.rope_dim), dim=-1)
        latent, k_turned = both.split((c.kv_rank, c.rope_dim), dim=-1)
        q_turned, k_turned = self.positions(q_turned, k_turned[:, :, None], position, start)
        q = torch.cat((q_plain, q_turned), dim=-1).transpose(1, 2)
        return q, torch.cat((self.kv_norm(latent), k_turned[:, :, 0]), dim=-1)[:, None]

    def _expanded(self, q: Tensor, latent: Tensor, signals: Signals | None) -> tuple[Tensor, Tensor, Tensor, Kernel]:
        """Queries, keys and values of all heads, equally wide, and what makes [B, H, S, d_v] of the kernel's output.

        The fast kernels want one width: the narrower ones get zeros behind them.
        """
        c = self.config
        compressed, k_turned = latent.split((c.kv_rank, c.rope_dim), dim=-1)
        (both,) = products(compressed[:, 0], self.kv_up, signals=signals)
        both = both.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k_plain, v = both.split((c.nope_dim, c.value_dim), dim=-1)
        k = torch.cat((k_plain, k_turned.expand(-1, self.num_heads, -1, -1)), dim=-1)
        width = max(self.head_dim, c.value_dim)
        q, k, v = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
        return q, k, v, lambda y: y[..., : c.value_dim]

    def _absorbed(self, q: Tensor, latent: Tensor) -> tuple[Tensor, Tensor, Tensor, Kernel]:
        """The same for one key head of width r + d_r, which is also the value; of the output the last d_r are idle."""
        c = self.config
        # [H, d_n, r] and [H, d_v, r]
        to_key, to_value = self.kv_up.weight.view(self.num_heads, -1, c.kv_rank).split((c.nope_dim, c.value_dim), dim=1)
        q_plain, q_turned = q.split((c.nope_dim, c.rope_dim), dim=-1)
        q = torch.cat((q_plain @ to_key, q_turned), dim=-1)
        return q, latent, latent, lambda y: y[..., : c.kv_rank] @ to_value.transpose(1, 2)

    def _absorbs(self, queries: int) -> bool:
        """Whether absorbed matrices cost less: wider scores against making all heads' keys and values again."""
        c = self.config
        if type(self.kv_up) is not nn.Linear or self.kv_up._forward_hooks or self.kv_up._forward_pre_hooks:
            return False
        more = 2 * (c.cache_width - max(self.head_dim, c.value_dim))
        return queries * more <= c.kv_rank * (c.nope_dim + c.value_dim)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
        )

    def new_state(self, capacity: int) -> KVCache:
        """An empty cache for at most `capacity` tokens."""
        return KVCache(capacity=capacity)

    def extra_flops(self, seq_len: int) -> int:
        """Forward FLOPs per token of scores and of their product with the values: all pairs, causal or not, of the
        width that the kernel computes with."""
        return 4 * self.num_heads * max(self.head_dim, self.config.value_dim) * seq_len

    def extra_backward_flops(self, seq_len: int) -> int:
        """What a backward pass costs beyond two forward passes: the scores are computed again."""
        return self.extra_flops(seq_len) // 2


def _scale(config: LatentAttentionConfig) -> float:
    if config.scale is not None:
        return config.scale
    scale = (config.nope_dim + config.rope_dim) ** -0.5
    scaling = config.positions.scaling
    if isinstance(scaling, YaRN) and scaling.mscale_all_dim:
        scale *= scaling.sharpness(scaling.mscale_all_dim) ** 2
    return scale
