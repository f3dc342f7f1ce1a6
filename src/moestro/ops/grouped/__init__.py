"""The grouped product: a stack of matrices, one per group of consecutive rows."""

from .function import grouped_linear

__all__ = ["grouped_linear"]
