"""Single experts for banks of modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from . import config as cfg

__all__ = ["Convolution", "FeedForward", "activation"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "leaky_relu": F.leaky_relu,
}


def activation(name: cfg.Activation) -> Callable[[Tensor], Tensor]:
    """The function of an activation's name."""
    return _ACTIVATIONS[name]


class FeedForward(nn.Module):
    """down(act(up(x))) with biases. Shapes: [R, D] -> [R, D]."""

    def __init__(self, config: cfg.FeedForward, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, config.width)
        self.down = nn.Linear(config.width, dim)
        self.activation = activation(config.activation)

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(self.activation(self.up(rows)))


class Convolution(nn.Module):
    """Depthwise convolution, activation, pointwise convolution. Shapes: [R, C, H, W] -> [R, C, H, W]; C = dim."""

    def __init__(self, config: cfg.Convolution, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, config.kernel, padding=config.kernel // 2, groups=dim)
        self.pointwise = nn.Conv2d(dim, dim, 1)
        self.activation = activation(config.activation)

    def forward(self, rows: Tensor) -> Tensor:
        return self.pointwise(self.activation(self.depthwise(rows)))
