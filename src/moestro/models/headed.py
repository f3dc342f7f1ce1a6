"""An encoder with a head, and possibly one more layer between them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.carry import Carry
from ..core.errors import UserError
from ..core.pytree import changed
from ..core.signals import Signals
from ..core.trail import Trail
from ..nn.init import initialise
from .config import Headed as HeadedConfig
from .encoder import Encoder
from .stack import places

__all__ = ["Headed"]


class Headed(nn.Module):
    """`(tokens, signals, carry, features) -> (what the head says, carry, trail)`.

    Shapes: tokens [B, S] int64; features [B, S, C] floating point, where the config has C of them. Padding is
    `signals.valid` [B*S]. Trail: paths are those of the modules, such as "encoder.layers.3.ffn" and "top". The layer
    on top reads the encoder's output and replaces it, without residual or norm: 13 (arXiv 2204.09598), variant A.
    """

    def __init__(self, config: HeadedConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.encoder.dim
        self.encoder = Encoder(config.encoder.replace(seed=config.seed))
        self.features = nn.Linear(config.features, dim, bias=False) if config.features else None
        self.top: Any = None if config.top is None else config.top.build(dim)
        self.head: nn.Module = config.head.build(dim)
        if not self.encoder.embed.weight.is_meta:
            self._own(config.seed)

    def initialise(self, seed: int | None = None) -> None:
        """(Re)draw all parameters from the config's seed, or from another."""
        seed = self.config.seed if seed is None else seed
        self.encoder.initialise(seed)
        self._own(seed)

    def _own(self, seed: int) -> None:
        own = {name: part for name, part in self.named_children() if name != "encoder"}
        initialise(nn.ModuleDict(own), seed, self.config.encoder.init_std)

    def hidden(
        self,
        tokens: Tensor,
        signals: Signals | None = None,
        carry: Carry | None = None,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Carry, Trail]:
        """What the head reads, [B, S, D]."""
        signals = Signals() if signals is None else signals
        carry = Carry() if carry is None else carry
        if (features is None) != (self.features is None):
            raise UserError(f"Headed: the model has {self.config.features} features per token; pass as many")
        added = None if self.features is None else self.features(features)
        h, after, trail = self.encoder.hidden(tokens, signals.at("encoder"), carry.at("encoder"), added=added)
        carry, trail = carry.back("encoder", after), trail.under("encoder")
        if self.top is not None:
            seen = changed(signals.at("top"), **places(signals, h, None), token=tokens.reshape(-1), places=None)
            h, after, left = self.top(h, seen, carry.at("top"))
            carry, trail = carry.back("top", after), trail | left.under("top")
        return h, carry, trail

    def forward(
        self,
        tokens: Tensor,
        signals: Signals | None = None,
        carry: Carry | None = None,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Carry, Trail]:
        h, carry, trail = self.hidden(tokens, signals, carry, features)
        valid = None if signals is None or signals.valid is None else signals.valid.view(tokens.shape)
        return self.head(h, valid), carry, trail
