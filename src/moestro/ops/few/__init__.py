"""What one decoded token meets besides experts, without a gradient: products with few rows, norms, one query's
attention. Each function but `linear` answers None where it does not apply, and the caller goes on with torch."""

from .attend import attend_one
from .linears import linear, linears
from .norm import rms_norm
from .route import route

__all__ = ["attend_one", "linear", "linears", "rms_norm", "route"]
