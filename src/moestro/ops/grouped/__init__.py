"""The grouped product: a stack of matrices, one per group of consecutive rows."""

from . import flops as _flops  # registers the formulas
from .choose import choose, explain
from .function import grouped_linear
from .spec import Spec

__all__ = ["Spec", "choose", "explain", "grouped_linear"]

del _flops
