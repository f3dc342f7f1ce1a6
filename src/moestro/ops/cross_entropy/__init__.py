"""Chunked cross-entropy over a vocabulary projection."""

from .function import chunk_size, cross_entropy

__all__ = ["chunk_size", "cross_entropy"]
