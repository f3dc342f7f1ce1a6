"""Configs of heads that turn an encoder's hidden states into what a task asks for. Built with (dim)."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import Config, config

__all__ = ["ClassHead", "EmbeddingHead", "Head", "SpanHead"]


@config
class Head(Config):
    """Base of heads: `(h [B, S, D], valid [B, S] or None) -> tensor`."""


@config
class SpanHead(Head):
    """Two logits per token: that an answer begins there, and that it ends there."""

    builds: ClassVar[str] = "moestro.models.heads:SpanHead"


@config
class ClassHead(Head):
    """Logits of classes, from one vector per text."""

    builds: ClassVar[str] = "moestro.models.heads:ClassHead"
    num_classes: int = 2
    """Number of classes."""
    pooling: Literal["mean", "first"] = "mean"
    """Which vector: the mean over the text's tokens, or that of its first token."""

    def __post_init__(self) -> None:
        self.at_least(1, "num_classes")


@config
class EmbeddingHead(Head):
    """One embedding per text: a pooled vector, layer norm, linear map, tanh, linear map (brief 34)."""

    builds: ClassVar[str] = "moestro.models.heads:EmbeddingHead"
    pooling: Literal["mean", "first"] = "mean"
    """Which vector: the mean over the text's tokens, or that of its first token."""
    temperature: float | None = None
    """Start of a learned temperature that inner products of two embeddings are divided by; None = none."""

    def __post_init__(self) -> None:
        self.positive("temperature")
