"""Products in a fixed order: a row comes out the same, to the last bit, alone and in any batch."""

from .linear import linear, supported

__all__ = ["linear", "supported"]
