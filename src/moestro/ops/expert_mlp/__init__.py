"""Expert MLPs, gated and plain: on rows sorted by expert, from units to mixtures, and for a few units when decoding."""

from . import flops as _flops  # registers the formulas
from .activations import ACTIVATIONS, Clamp
from .choose import explain
from .few import FEW, gated_few
from .functions import gated_mixture, gated_mlp, mlp, mlp_mixture
from .problem import Spec

__all__ = [
    "ACTIVATIONS",
    "FEW",
    "Clamp",
    "Spec",
    "explain",
    "gated_few",
    "gated_mixture",
    "gated_mlp",
    "mlp",
    "mlp_mixture",
]

del _flops
