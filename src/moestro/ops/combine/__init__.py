"""Carrying units to rows (`gather_rows`) and rows back to units (`combine`), in a stated order of summation."""

from .functions import combine, gather_rows, table_weight
from .through import through

__all__ = ["combine", "gather_rows", "table_weight", "through"]
