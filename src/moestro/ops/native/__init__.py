"""CPU kernels: C source shipped in the package, compiled once per machine, loaded into torch's own threads."""

from .build import load, reason
from .library import Library

__all__ = ["Library", "load", "reason"]
