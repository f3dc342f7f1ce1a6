"""Dense MLPs: gated, and of two plain maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.carry import Carry
from ..core.params import ParamInfo
from ..core.signals import Signals
from ..core.trail import Trail
from ..ops.few import linear
from .config import FeedForward as FeedForwardConfig
from .config import PlainFeedForward as PlainConfig

__all__ = ["FeedForward", "PlainFeedForward"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "leaky_relu": F.leaky_relu,
}


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)): `(x, signals, carry) -> (y, carry, trail)`, the trail empty.

    Shapes: x [..., D] -> y [..., D]; gate_up [2F, D], gate rows first; down [D, F]. Source: Shazeer 2020 (SwiGLU).
    """

    role = "dense"

    def __init__(self, config: FeedForwardConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.gate_up = nn.Parameter(torch.empty(2 * config.width, dim))
        self.down = nn.Parameter(torch.empty(dim, config.width))
        self.activation = _ACTIVATIONS[config.activation]
        for matrix in (self.gate_up, self.down):
            nn.init.normal_(matrix, std=0.02)

    def forward(
        self, x: Tensor, signals: Signals | None = None, carry: Carry | None = None
    ) -> tuple[Tensor, Carry, Trail]:
        gate, up = linear(x, self.gate_up).chunk(2, dim=-1)
        y = linear(self.activation(gate) * up, self.down)
        return y, Carry() if carry is None else carry, Trail()

    def param_info(self) -> dict[str, ParamInfo]:
        return {
            "gate_up": ParamInfo(role="dense", matrix_axes=(0, 1), parts=("gate", "up")),
            "down": ParamInfo(role="dense", matrix_axes=(0, 1)),
        }

    def extra_flops(self, seq_len: int) -> int:
        return 2 * (self.gate_up.numel() + self.down.numel())


class PlainFeedForward(nn.Module):
    """down(act(up(x) + up_bias)) + down_bias: `(x, signals, carry) -> (y, carry, trail)`, the trail empty.

    Shapes: x [..., D] -> y [..., D]; up [F, D], down [D, F], up_bias [F], down_bias [D] (the biases only with
    `bias=True`). Source: Vaswani et al. 2017, eq. 2; without biases Raffel et al. 2020 (T5).
    """

    role = "dense"

    def __init__(self, config: PlainConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.up = nn.Parameter(torch.empty(config.width, dim))
        self.down = nn.Parameter(torch.empty(dim, config.width))
        self.up_bias = nn.Parameter(torch.zeros(config.width)) if config.bias else None
        self.down_bias = nn.Parameter(torch.zeros(dim)) if config.bias else None
        self.activation = _ACTIVATIONS[config.activation]
        for matrix in (self.up, self.down):
            nn.init.normal_(matrix, std=0.02)

    def forward(
        self, x: Tensor, signals: Signals | None = None, carry: Carry | None = None
    ) -> tuple[Tensor, Carry, Trail]:
        h = linear(x, self.up)
        h = self.activation(h if self.up_bias is None else h + self.up_bias)
        y = linear(h, self.down)
        y = y if self.down_bias is None else y + self.down_bias
        return y, Carry() if carry is None else carry, Trail()

    def param_info(self) -> dict[str, ParamInfo]:
        matrix = ParamInfo(role="dense", matrix_axes=(0, 1))
        info = {"up": matrix, "down": matrix}
        if self.config.bias:
            bias = ParamInfo(role="dense", decay=False, init_std=0.0)
            info |= {"up_bias": bias, "down_bias": bias}
        return info

    def extra_flops(self, seq_len: int) -> int:
        return 2 * (self.up.numel() + self.down.numel())
