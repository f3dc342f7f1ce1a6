"""Experts with weights in bf16, or in blocks of int8 or int4."""

from .format import KINDS, Kind, Packed, bytes_of, pack, unpack

__all__ = ["KINDS", "Kind", "Packed", "bytes_of", "pack", "unpack"]
