"""Expert MLPs on rows sorted by expert: gated and plain, forward and backward in one pass over the experts."""

from .activations import ACTIVATIONS
from .gated import gated_mlp
from .plain import mlp

__all__ = ["ACTIVATIONS", "gated_mlp", "mlp"]
