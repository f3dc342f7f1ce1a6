"""Networks by modality. Configs load no torch."""

from __future__ import annotations

from .config import (
    Block,
    CrossBlock,
    Decoder,
    Encoder,
    EncoderDecoder,
    ParallelBlock,
    PostNormBlock,
    PostNormCrossBlock,
    Stack,
)
from .examples import encoder_decoders, encoders, examples
from .published import published

__all__ = [
    "Block",
    "CrossBlock",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "ParallelBlock",
    "PostNormBlock",
    "PostNormCrossBlock",
    "Stack",
    "encoder_decoders",
    "encoders",
    "examples",
    "published",
]
