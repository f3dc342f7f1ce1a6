"""Config of several decoders as one model. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import Config, config
from ..core.errors import UserError
from .config import Decoder

__all__ = ["Ensemble"]


@config
class Ensemble(Config):
    """Decoders of one vocabulary whose outputs are averaged, token by token (Growing Transformers, brief 45, A)."""

    builds: ClassVar[str] = "moestro.models.ensemble:Ensemble"
    models: tuple[Decoder, ...] = (Decoder(), Decoder(seed=1))
    """The decoders."""
    space: Literal["logits", "probabilities"] = "logits"
    """What is averaged: logits (the normalised geometric mean of the distributions) or probabilities."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("Ensemble.models: give at least one decoder")
        sizes = {m.vocab_size for m in self.models}
        if len(sizes) > 1:
            raise UserError(
                f"Ensemble.models: need one vocabulary, found {' and '.join(map(str, sorted(sizes)))} tokens"
            )
        if any(m.cross is not None for m in self.models):
            raise UserError("Ensemble.models: a decoder with cross-attention is part of an EncoderDecoder")

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.models[0].vocab_size

    @property
    def context(self) -> int:
        """The most tokens of a sequence: of the shortest context."""
        return min(m.context for m in self.models)
