"""Blocks that norm their sums: the order of the first Transformer, of BERT and of fairseq's translation models."""

from __future__ import annotations

from torch import Tensor

from ..core.carry import Carry
from ..core.signals import Signals
from ..core.trail import Trail
from ..nn.cross import Memory
from .cross import CrossBlock
from .decoder import Block

__all__ = ["PostNormBlock", "PostNormCrossBlock"]


class PostNormBlock(Block):
    """h <- norm(h + mixer(h)); h <- norm(h + ffn(h)). Call and parameters as those of `Block`.

    Source: Vaswani et al. 2017, section 3.1: LayerNorm(x + Sublayer(x)), dropout on the sub-layer's output.
    """

    def forward(
        self, h: Tensor, signals: Signals, carry: Carry, bias: Tensor | None = None
    ) -> tuple[Tensor, Carry, Trail]:
        state = carry.own.get("mixer")
        y, attend, carry, trail = self.mix(h, signals, carry, state, bias)
        h = self.mixer_norm(self.add(h, y, "mixer", signals, state))
        y, carry, left = self.feed(h, signals, carry, state, attend)
        return self.ffn_norm(self.add(h, y, "ffn", signals, state)), carry, trail | left


class PostNormCrossBlock(CrossBlock):
    """`PostNormBlock` with cross-attention between both; call and parameters as those of `CrossBlock`."""

    def forward(
        self, h: Tensor, signals: Signals, carry: Carry, bias: Tensor | None = None, memory: Memory | None = None
    ) -> tuple[Tensor, Carry, Trail]:
        state = carry.own.get("mixer")
        y, attend, carry, trail = self.mix(h, signals, carry, state, bias)
        h = self.mixer_norm(self.add(h, y, "mixer", signals, state))
        y, seen = self.cross(h, memory, carry.own.get("cross"), signals)
        h = self.cross_norm(self.add(h, y, "cross", signals, state))
        if seen is not None:
            carry = carry.put("cross", seen)
        y, carry, left = self.feed(h, signals, carry, state, attend)
        return self.ffn_norm(self.add(h, y, "ffn", signals, state)), carry, trail | left
