"""Mix steps: distributions of units averaged over the units that are similar, or attended to, before selection.

Both compute probs' = M probs with a matrix M whose rows sum to 1 over the units that a unit may see: units of its own
sequence, no padding. What selection orders by (`Scores.rank`, where there is noise) is averaged alike. The expert still
processes the unit itself. Source: 03, arXiv 2505.00792.

Cached decoding: `Decoder.new_cache` puts `new_state` under the step's path; distributions (and inputs) of what came
before lie there, so a cached pass equals the whole one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.carry import Carry
from ..core.errors import UserError
from ..core.params import ParamInfo
from ..core.pytree import changed
from ..core.signals import Signals
from ..nn.cache import KVCache
from ..nn.mask import visible
from . import config as cfg
from .steps import MixStep, Scores

__all__ = ["AttentionMixStep", "SimilarityMixStep"]


class SimilarityMixStep(MixStep):
    """probs' = S probs, S = softmax(U W_s U^T / tau) by rows, over the units that a unit may see.

    Shapes: U [N, D] the router's input of one sequence, W_s [D, D], S [N, N]. Units are grouped in rows by
    `signals.rows`, told apart by `signals.segment` and `signals.valid`; without rows all units are compared with all.
    """

    def __init__(self, config: cfg.SimilarityMix, dim: int, num_ids: int) -> None:
        super().__init__()
        self.config = config
        self.causal = config.causal
        self.num_ids = num_ids
        self.offset = dim**-0.5 if config.start == "identity" else 0.0
        self.width = dim**0.5 if config.scale == "sqrt_dim" else 1.0
        self.weight = nn.Parameter(torch.empty(dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.offset:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.weight.shape[0] ** -0.5)

    def forward(self, scores: Scores, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        table = _table(scores)
        B, S = _shape(signals, x)
        u, r = x.reshape(B, S, x.shape[1]), table.view(B, S, table.shape[1])
        valid, segment = (None if t is None else t.view(B, S) for t in (signals.valid, signals.segment))
        keys, values, key_valid, key_segment = u, r, valid, segment
        if isinstance(carry.mine, KVCache):
            state = carry.mine.extend(u[:, None], r[:, None], valid, segment)
            keys, values = (t[:, 0] for t in state.seen())
            key_valid, key_segment = state.marks()
            carry = carry.keep(state)
        asked = u @ self.weight.to(u.dtype)
        if self.offset:
            asked = asked + u * self.offset
        tau = signals.knob("mix_tau", self.config.tau) * self.width
        similar = asked @ keys.transpose(1, 2) / tau
        mask = visible(
            S,
            keys.shape[1],
            valid=key_valid,
            segment=key_segment,
            query_segment=segment,
            device=x.device,
            causal=self.causal,
        )
        if mask is not None:
            similar = similar.masked_fill(~(mask if mask.ndim == 2 else mask[:, 0]), float("-inf"))
        return _mixed(scores, (similar.softmax(-1) @ values).reshape(table.shape)), carry

    def new_state(self, capacity: int) -> KVCache | None:
        return KVCache(capacity=capacity) if self.causal else None

    def param_info(self) -> dict[str, ParamInfo]:
        std = 0.0 if self.offset else self.weight.shape[0] ** -0.5
        return {"weight": ParamInfo(role="router", matrix_axes=(0, 1), init_std=std)}

    def extra_flops(self, seq_len: int) -> int:
        """U W_s, its product with the units (all pairs, causal or not), and the mean."""
        D = self.weight.shape[0]
        return 2 * D * D + 2 * seq_len * (D + self.num_ids)

    def extra_repr(self) -> str:
        return f"tau={self.config.tau}, causal={self.causal}"


class AttentionMixStep(MixStep):
    """probs' = A probs, A = sum over heads of H_ih A^h of the attention before the layer; H_ih = 1 / heads, or the
    posterior of head h: softmax over h of -|u_i - c_i^h|^2 / (2 sigma^2), c_i^h what the head adds to unit i's
    attention output and u_i what the router reads (uniform prior).

    Rows of A sum to 1, or to less where the attention has sinks. A is never made: `signals.attend` (`nn.operator`)
    applies it, v -> A v, by one more call of the attention's kernel, in the dtype of its queries. Gradients flow
    through A and H as well. FLOPs are counted as those of A v; the kernel computes its scores anew, and contributions
    of heads take as much as its output map: blocks count both (`models.decoder.Block`).
    """

    needs = ("attend",)

    def __init__(self, config: cfg.AttentionMix, dim: int, num_ids: int) -> None:
        super().__init__()
        self.config = config
        self.posterior = config.heads == "posterior"
        self.num_ids = num_ids

    def forward(self, scores: Scores, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        assert signals.attend is not None
        table = _table(scores)
        seen = table
        if isinstance(carry.mine, KVCache):
            if signals.rows is None:
                raise UserError("AttentionMix: cached decoding needs Signals.rows, the number of sequences")
            r = table.view(*_shape(signals, x), table.shape[1])[:, None]
            state = carry.mine.extend(r[..., :0], r, None, None)
            seen = state.seen()[1].reshape(-1, table.shape[1])
            carry = carry.keep(state)
        weight = (self._weight(signals.attend, x),) if self.posterior else ()
        return _mixed(scores, signals.attend(seen, *weight)), carry

    def _weight(self, attend: Any, x: Tensor) -> Tensor:
        """[T, H] posterior of heads; |u|^2 is the same for all of them."""
        if not hasattr(attend, "contributions"):
            raise UserError(
                'AttentionMix: heads="posterior" needs a `signals.attend` that knows its heads\' contributions'
            )
        c = attend.contributions().to(x.dtype)
        near = 2 * (x[:, None] * c).sum(-1) - c.square().sum(-1)
        return (near / (2 * self.config.sigma**2)).softmax(-1)

    def new_state(self, capacity: int) -> KVCache:
        return KVCache(capacity=capacity)

    def extra_flops(self, seq_len: int) -> int:
        return 2 * seq_len * self.num_ids

    def extra_repr(self) -> str:
        return f"heads={self.config.heads}"


def _shape(signals: Signals, x: Tensor) -> tuple[int, int]:
    """(rows, units per row)."""
    T, rows = x.shape[0], signals.rows or 1
    if T % rows:
        raise UserError(f"Signals.rows: {T} units are no {rows} rows of equal length")
    return rows, T // rows


def _table(scores: Scores) -> Tensor:
    """[T, E'] what is averaged: the distribution, and beside it the order of selection where that is another one."""
    return scores.probs if scores.rank is None else torch.cat((scores.probs, scores.rank), dim=1)


def _mixed(scores: Scores, table: Tensor) -> Scores:
    if scores.rank is None:
        return changed(scores, probs=table)
    probs, rank = table.split(scores.probs.shape[1], dim=1)
    return changed(scores, probs=probs, rank=rank.detach())
