"""Grouped-query attention over exact scaled-dot-product kernels."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.draws import fold
from ..core.errors import UserError
from ..core.params import ParamInfo
from ..core.signals import Signals
from ..ops.few import attend_one
from . import dropped, sinks
from .cache import KVCache
from .config import Attention as AttentionConfig
from .config import RelativeBias as RelativeBiasConfig
from .config import RMSNorm as RMSNormConfig
from .linear import products
from .mask import kernel_mask, per_row, visible
from .norm import RMSNorm, plain
from .operator import Operator, by_head, mean_map
from .relative import joined
from .rotary import Rotary

__all__ = ["Attention"]

HeadNorms = tuple[Tensor, Tensor, float]  # weights for queries and keys, epsilon


class Attention(nn.Module):
    """Grouped-query attention: `(x, signals, state) -> (y, state)`.

    Shapes: x [B, S, D] -> y [B, S, D]; of the signals, [B*S] each: `valid` (padding is seen by nobody; its own output
    is finite and means nothing), `position` (default: the place in the row, after what the state holds) and `segment`
    (tokens see their own sequence only; leave it None where every row is one sequence). state None = nothing is kept;
    `new_state(capacity)` starts a cache.

    gate [B, S, H]: a factor on each head's output, before the output map (mixtures of attention experts).
    bias [1, H, S, N']: added to the scores of the last N' keys, at least as many as there are (`nn.relative`).

    config.dropout: in training, entries of the attention maps are dropped by draws of `signals.seed` and the queries'
    unit ids; the operator below is without.

    With `operator=True` the call returns a third value, the attention as an `Operator` on the units: v [B*N, C] -> A v
    [B*S, C], the mean over heads of the attention map times v, where N >= the number of keys held are the last units
    seen (N = S without a state). It costs one more kernel call when it is called, nothing otherwise. What it says of
    each head's contribution is without gate.
    """

    role = "attention"
    offers_operator = True

    def __init__(self, config: AttentionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = config.width(dim)
        self.window = config.window
        self.scale = config.scale
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = config.bias != "none"
        self.q = nn.Linear(dim, wide, bias=bias)
        self.k = nn.Linear(dim, narrow, bias=bias)
        self.v = nn.Linear(dim, narrow, bias=bias)
        self.o = nn.Linear(wide, dim, bias=config.bias == "all")
        self.sinks = nn.Parameter(torch.zeros(self.num_heads)) if config.sinks else None
        norm = RMSNormConfig(eps=config.norm_eps)
        sizes = (self.head_dim, self.head_dim) if config.qk_norm == "head" else (wide, narrow)
        self.q_norm = RMSNorm(norm, sizes[0]) if config.qk_norm else None
        self.k_norm = RMSNorm(norm, sizes[1]) if config.qk_norm else None
        self.causal = config.causal
        self.dropout = config.dropout
        positions = config.positions
        self.positions = self.relative = None
        if isinstance(positions, RelativeBiasConfig):
            self.relative = positions.build(self.num_heads, self.causal)
        elif positions is not None:
            self.positions = positions.build(self.head_dim)

    @overload
    def forward(
        self,
        x: Tensor,
        signals: Signals | None = None,
        state: KVCache | None = None,
        operator: Literal[False] = False,
        gate: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, KVCache | None]: ...

    @overload
    def forward(
        self,
        x: Tensor,
        signals: Signals | None,
        state: KVCache | None,
        operator: Literal[True],
        gate: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, KVCache | None, Operator]: ...

    def forward(
        self,
        x: Tensor,
        signals: Signals | None = None,
        state: KVCache | None = None,
        operator: bool = False,
        gate: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, KVCache | None] | tuple[Tensor, KVCache | None, Operator]:
        B, S, _ = x.shape
        if state is not None and not self.causal:
            raise UserError("attention: a cache is for causal attention; here tokens see what comes after them")
        valid, position, segment = per_row(signals, B, S)
        own: dict[str, Any] = self._modules  # as self.q and so on, for a quarter of the time
        q, k, v = products(x, own["q"], own["k"], own["v"], signals=signals)
        one = S == 1 and state is not None and valid is None and position is None and segment is None
        one = one and bias is None and self.relative is None and not (self.dropout and self.training)
        norms = self._plain_head_norms() if one else None
        if self.config.qk_norm is not None and norms is None:
            q, k = self._normed(q, k)
        if one:
            assert state is not None
            y = self._one(q, k, v, state, norms)
            if y is not None:
                after, heads = state.extended(), y
                y = self._out(y, gate, signals)
                if not operator:
                    return y, after
                return y, after, self._operator_of_one(q, k, heads, norms is not None, state.length, after)
            if norms is not None:
                q, k = self._normed(q, k)
        q = q.view(B, S, self.num_heads, self.head_dim)
        k = k.view(B, S, self.num_kv_heads, self.head_dim)
        v = v.view(B, S, self.num_kv_heads, self.head_dim)
        if self.positions is not None:
            q, k = self.positions(q, k, position, 0 if state is None else state.length)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

        fresh = state is None or state.length == 0
        key_valid, key_segment = valid, segment
        if state is not None:
            state = state.extend(k, v, valid, segment, self.window)
            if not fresh:
                k, v = state.seen()
                key_valid, key_segment = state.marks()
        mask, causal = kernel_mask(S, k.shape[2], self.window, key_valid, key_segment, segment, x.device, self.causal)
        if S == 1 and self.window is not None and mask is None and k.shape[2] > self.window:
            k, v = k[:, :, -self.window :], v[:, :, -self.window :]
        if self.relative is not None:
            own_bias = self.relative(S, k.shape[2])
            bias = own_bias if bias is None else bias[..., -k.shape[2] :] + own_bias
        if bias is not None:
            mask, causal = joined(bias, mask, causal, k.shape[2], q.dtype), False
        if self.dropout and self.training:
            y = self._drop(q, k, v, mask, causal, signals, k.shape[2] - S)
        else:
            y = self._attend(q, k, v, mask, causal)
        heads = y.transpose(1, 2).reshape(B, S, self.num_heads * self.head_dim)
        y = self._out(heads, gate, signals)
        if not operator:
            return y, state
        return y, state, self._operator(q, k, heads, mask, causal)

    def _out(self, y: Tensor, gate: Tensor | None, signals: Signals | None) -> Tensor:
        """The heads' outputs [B, S, H*d], each times its gate, through the output map."""
        if gate is not None:
            y = (y.unflatten(2, (self.num_heads, self.head_dim)) * gate[..., None].to(y.dtype)).flatten(2)
        return products(y, self._modules["o"], signals=signals)[0]  # type: ignore[arg-type]

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None
        assert self.k_norm is not None
        if self.config.qk_norm == "full":
            return self.q_norm(q), self.k_norm(k)
        heads = (-1, self.head_dim)
        return self.q_norm(q.unflatten(2, heads)).flatten(2), self.k_norm(k.unflatten(2, heads)).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        if self.sinks is not None:
            scale = self.head_dim**-0.5 if self.scale is None else self.scale
            if q.shape[2] == 1 and mask is None:
                return sinks.attend_one(q, k, v, self.sinks, scale)
            return sinks.attend(q, k, v, self.sinks, scale, mask, causal)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
        )

    def _drop(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, signals: Signals | None, start: int
    ) -> Tensor:
        B, _, S, _ = q.shape
        if causal:
            mask = visible(S, S, device=q.device)
        units = dropped.unit_ids(signals, B, S, start, q.device)
        seed = fold(0 if signals is None else signals.seed, "dropout.attention")
        return dropped.attend(q, k, v, self.dropout, seed, units, mask, self.scale)

    def _plain_head_norms(self) -> HeadNorms | None:
        """What `attend_one` needs to norm heads itself; None where there are no such norms, or they must be called."""
        if self.config.qk_norm != "head":
            return None
        q, k = self._modules["q_norm"], self._modules["k_norm"]
        if not (plain(q) and plain(k) and q.eps == k.eps):
            return None
        return q._parameters["weight"], k._parameters["weight"], q.eps  # type: ignore[return-value]

    def _one(self, q: Tensor, k: Tensor, v: Tensor, state: KVCache, norms: HeadNorms | None) -> Tensor | None:
        """One new token per sequence, its key and value written into the cache; or None, and nothing is written."""
        turn = self.positions
        if not state.has_place() or not (turn is None or type(turn) is Rotary) or self.sinks is not None:
            return None
        assert state.key is not None
        assert state.value is not None
        rotation = {} if turn is None else turn.of_one(state.length)
        first = 0 if self.window is None else max(0, state.held + 1 - self.window)
        return attend_one(
            q, k, v, state.key, state.value, state.held, first=first, norms=norms, scale=self.scale, **rotation
        )

    def _operator_of_one(self, q: Tensor, k: Tensor, heads: Tensor, raw: bool, start: int, after: KVCache) -> Operator:
        def attend(value: Tensor, weight: Tensor | None) -> Tensor:
            turned = (self._normed(q, k)[0] if raw else q).unflatten(2, (-1, self.head_dim))
            if self.positions is not None:
                turned, _ = self.positions(turned, turned, None, start)
            keys = after.seen()[0] if self.window is None else after.seen()[0][:, :, -self.window :]
            return self._operator(turned.transpose(1, 2), keys, heads, None, False)(value, weight)

        return Operator(attend, lambda: self._parts(heads))

    def _operator(self, q: Tensor, k: Tensor, heads: Tensor, mask: Tensor | None, causal: bool) -> Operator:
        return mean_map(lambda v: self._attend(q, k, v, mask, causal), q, k, lambda: self._parts(heads))

    def _parts(self, heads: Tensor) -> Tensor:
        """What each head adds, of the heads' outputs [B, S, H*d]."""
        return by_head(heads.unflatten(2, (self.num_heads, self.head_dim)), self.o)

    def new_state(self, capacity: int) -> KVCache:
        """An empty cache for at most `capacity` tokens."""
        return KVCache(capacity=capacity)

    def param_info(self) -> dict[str, ParamInfo]:
        return {"sinks": ParamInfo(role="attention", decay=False, init_std=0.0)}

    def extra_flops(self, seq_len: int) -> int:
        """Forward FLOPs per token of scores and of their product with the values: all pairs, causal or not."""
        if self.sinks is not None and seq_len > 1:
            pairs = (seq_len + 1) * seq_len  # one more key; without a mask one more query per sequence as well
            if self.window is None or seq_len <= self.window:
                pairs += seq_len + 1
            return 4 * self.num_heads * sinks.widened(self.head_dim) * pairs // seq_len
        return 4 * self.num_heads * self.head_dim * seq_len

    def extra_backward_flops(self, seq_len: int) -> int:
        """What a backward pass costs beyond two forward passes: the scores are computed again, unless they have a
        learned bias or are dropped from, for which the plain path keeps them."""
        return 0 if self.relative is not None or self.dropout else self.extra_flops(seq_len) // 2
