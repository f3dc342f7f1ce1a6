"""What one decoded token meets besides experts, without a gradient: products with few rows, norms, one query's
attention. Each function answers None where it does not apply, and the caller goes on with torch."""

from .attend import attend_one
from .linears import linears
from .norm import rms_norm

__all__ = ["attend_one", "linears", "rms_norm"]
