"""Rows: the sorted (unit, slot, expert) triples that a plan asks for, derived once per dispatch."""

from .derive import rows

__all__ = ["rows"]
