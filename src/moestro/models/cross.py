"""The block of a decoder that looks at a memory."""

from __future__ import annotations

from torch import Tensor

from ..core.carry import Carry
from ..core.signals import Signals
from ..core.trail import Trail
from ..nn.cross import Memory
from .config import CrossBlock as CrossBlockConfig
from .decoder import Block

__all__ = ["CrossBlock"]


class CrossBlock(Block):
    """Pre-norm block with cross-attention between mixer and feed-forward layer.

    `(h [B, S, D], signals, carry, bias, memory) -> (h, carry, trail)`. The keys and values of the memory travel in
    `carry.own` under "cross"; none there = none are kept, and the memory must be given.
    """

    def __init__(self, config: CrossBlockConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.cross_norm = config.norm.build(dim)
        self.cross = config.cross.build(dim, config.source_dim)
        self.draws = self.draws or bool(config.cross.dropout)

    def forward(
        self, h: Tensor, signals: Signals, carry: Carry, bias: Tensor | None = None, memory: Memory | None = None
    ) -> tuple[Tensor, Carry, Trail]:
        state = carry.own.get("mixer")
        y, attend, carry, trail = self.mix(self.mixer_norm(h), signals, carry, state, bias)
        h = self.add(h, y, "mixer", signals, state)
        y, seen = self.cross(self.cross_norm(h), memory, carry.own.get("cross"), signals)
        h = self.add(h, y, "cross", signals, state)
        if seen is not None:
            carry = carry.put("cross", seen)
        y, carry, left = self.feed(self.ffn_norm(h), signals, carry, state, attend)
        return self.add(h, y, "ffn", signals, state), carry, trail | left
