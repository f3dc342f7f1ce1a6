"""Networks by modality. Configs load no torch."""

from __future__ import annotations

from .config import (
    Block,
    CrossBlock,
    Decoder,
    Encoder,
    EncoderDecoder,
    Headed,
    ParallelBlock,
    PostNormBlock,
    PostNormCrossBlock,
    Stack,
)
from .ensembles import Ensemble
from .examples import encoder_decoders, encoders, examples, with_heads
from .heads_config import ClassHead, EmbeddingHead, Head, SpanHead
from .published import published

__all__ = [
    "Block",
    "ClassHead",
    "CrossBlock",
    "Decoder",
    "EmbeddingHead",
    "Encoder",
    "EncoderDecoder",
    "Ensemble",
    "Head",
    "Headed",
    "ParallelBlock",
    "PostNormBlock",
    "PostNormCrossBlock",
    "SpanHead",
    "Stack",
    "encoder_decoders",
    "encoders",
    "examples",
    "with_heads",
    "published",
]
