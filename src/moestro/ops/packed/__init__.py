"""Experts and products with weights in bf16, or in blocks of int8 or int4: smaller, and read in less time."""

from .format import BLOCK, KINDS, Kind, Packed, bytes_of, pack, unpack
from .op import FEW, packed_few, packed_linear, packed_rows

__all__ = [
    "BLOCK",
    "FEW",
    "KINDS",
    "Kind",
    "Packed",
    "bytes_of",
    "pack",
    "packed_few",
    "packed_linear",
    "packed_rows",
    "unpack",
]
