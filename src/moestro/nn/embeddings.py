"""Configs of embeddings that are fixed in advance and never trained. No torch. Built with (vocab_size, dim, scale)."""

from __future__ import annotations

from typing import ClassVar

from ..core.config import Config, config
from ..core.errors import UserError

__all__ = ["FrozenEmbedding", "FrozenTable", "Glyphs", "IdCode"]


@config
class FrozenEmbedding(Config):
    """Base of embeddings that are no parameters: `tokens [...] -> [..., D]`. Source: Growing Transformers, brief 45."""


@config
class IdCode(FrozenEmbedding):
    """The bits of a token's number, 0 or 1, least significant first, repeated to the model's width.

    It says nothing beyond the number; its rank is at most the number of bits (brief 45, section 2: 16 bits).
    """

    builds: ClassVar[str] = "moestro.nn.embedding:IdCode"
    bits: int = 16
    """Bits of the code; the model's width is a multiple of it, and 2^bits numbers are told apart."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 62:
            raise UserError(f"IdCode.bits: {self.bits} does not lie in 1..62")


@config
class Glyphs(FrozenEmbedding):
    """Pictures of characters: token n is the character with the code point n (bytes: Latin-1), drawn as a bitmap.

    For other vocabularies see `nn.glyphs.glyph_table`, whose result goes into a file for `FrozenTable`. Principal
    components differ in the last bits between machines, so the table is saved with the model (brief 45, section 1).
    """

    builds: ClassVar[str] = "moestro.nn.embedding:Glyphs"
    cell: int = 32
    """Height and width of the bitmap in pixels, at least the root of the width. In small ones many look alike."""
    font: str = ""
    """Font file; empty = DejaVu Sans, which comes with matplotlib (the authors: GNU Unifont)."""

    def __post_init__(self) -> None:
        self.at_least(4, "cell")


@config
class FrozenTable(FrozenEmbedding):
    """Any table [V, D] from a file, such as the authors' normalized_embeddings_weights; saved with the model."""

    builds: ClassVar[str] = "moestro.nn.embedding:FrozenTable"
    path: str = ""
    """File: .safetensors, .npy, or .pt that holds nothing but tensors. Nothing in it is ever run."""
    name: str = ""
    """Name of the tensor, in files of several; empty = the only one."""
