"""The encoder: blocks in which every token sees its whole sequence."""

from __future__ import annotations

from torch import Tensor, nn

from ..core.carry import Carry
from ..core.signals import Signals
from ..core.trail import Trail
from .config import Encoder as EncoderConfig
from .stack import Stack

__all__ = ["Encoder"]


class Encoder(Stack):
    """`(tokens, signals, carry) -> (h, carry, trail)`: hidden states after the last norm. Heads belong to tasks.

    Shapes: tokens [B, S] int64 -> h [B, S, D]. Padding (`signals.valid` [B*S]) is seen by nobody and routed nowhere;
    its own h is finite and means nothing. Trail: paths are those of the modules, such as "layers.3.ffn".
    """

    config: EncoderConfig

    def __init__(self, config: EncoderConfig, embed: nn.Module | None = None) -> None:
        super().__init__(config, embed)
        if not self.embed.weight.is_meta:
            self.initialise()

    def forward(
        self, tokens: Tensor, signals: Signals | None = None, carry: Carry | None = None
    ) -> tuple[Tensor, Carry, Trail]:
        return self.hidden(tokens, signals, carry)
