"""Routed experts on a GPU by Triton kernels; a backend of routed experts (see `choose`). Loads Triton on first use."""

from .backend import NAME, backward, forward, supported

__all__ = ["NAME", "backward", "forward", "supported"]
