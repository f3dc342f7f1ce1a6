"""Networks by modality. Configs load no torch."""

from __future__ import annotations

from .config import Block, Decoder
from .examples import examples
from .published import published

__all__ = ["Block", "Decoder", "examples", "published"]
