"""Expert banks, `(rows, index, context=None, weights=None) -> rows`: stacked, or of modules. Torch-free configs."""

from .config import (
    MLP,
    ClampedGated,
    Convolution,
    Experts,
    FeedForward,
    Gated,
    GatedExtension,
    Modules,
    Unit,
    examples,
)

__all__ = [
    "MLP",
    "ClampedGated",
    "Convolution",
    "Experts",
    "FeedForward",
    "Gated",
    "GatedExtension",
    "Modules",
    "Unit",
    "examples",
]
