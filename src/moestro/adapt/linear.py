"""Linear maps with something added to them: the frozen weight keeps its name, the delta is a child."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.carry import Carry
from ..core.errors import UserError
from ..core.params import ParamInfo
from ..core.signals import Signals
from ..core.trail import Trail
from ..nn.feedforward import FeedForward
from ..nn.linear import products
from ..ops.few import linear

__all__ = ["AdaptedFeedForward", "AdaptedLinear", "Delta"]


class Delta(nn.Module):
    """Base of what is added to the output of a linear map: `(x [..., I], signals) -> [..., O]`."""

    def forward(self, x: Tensor, signals: Signals | None = None) -> Tensor:
        raise NotImplementedError


class AdaptedLinear(nn.Module):
    """y = base(x) + delta(x), the base frozen. Shapes: x [..., I] -> y [..., O].

    `weight` and `bias` keep their names, so a state dict has the base's tensors under the same keys as before.
    takes_signals: Moestro's own modules pass their signals (validity, seed, unit ids) to maps that say so.
    """

    takes_signals = True

    def __init__(self, base: nn.Linear, delta: Delta) -> None:
        super().__init__()
        if list(base.children()):
            raise UserError(f"{type(base).__name__} has parts of its own and cannot be adapted as a linear map")
        self.in_features, self.out_features = base.in_features, base.out_features
        self._parameters.update(base._parameters)
        self.requires_grad_(False)
        base._parameters = self._parameters
        self._base = [base]  # a list hides it from the module tree
        if hasattr(base, "role"):
            self.role: Any = base.role
        self.delta = delta
        self.train(base.training)

    @property
    def base(self) -> nn.Linear:
        """The map without the delta; it shares the parameters."""
        return self._base[0]

    def forward(self, x: Tensor, signals: Signals | None = None) -> Tensor:
        # Moestro's modules, which pass signals, call plain maps by `products`, others call them: the base stays exact
        y = self.base(x) if signals is None else products(x, self.base)[0]
        return y + self.delta(x, signals=signals)

    def unload(self) -> nn.Linear:
        """The base, apart from this module, with the weights as they are now."""
        base = self.base
        base._parameters = dict(self._parameters)
        return base

    def extra_flops(self, seq_len: int) -> int:
        return 2 * self.weight.numel()  # type: ignore[union-attr, operator]

    def extra_backward_flops(self, seq_len: int) -> int:
        return -self.extra_flops(seq_len)  # a frozen weight has no gradient

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class AdaptedFeedForward(FeedForward):
    """The dense gated MLP, frozen, with deltas on gate, up and down: `(x, signals, carry) -> (y, carry, trail)`.

    Shapes: x [..., D] -> y [..., D]; `gate_up` and `down` keep their names; deltas are `deltas.gate`, `.up`, `.down`.
    """

    def __init__(self, base: FeedForward, deltas: dict[str, Delta]) -> None:
        nn.Module.__init__(self)
        self.config, self.activation = base.config, base.activation
        self._parameters.update(base._parameters)
        self.requires_grad_(False)
        base._parameters = self._parameters
        self._base = [base]
        self.deltas = nn.ModuleDict(deltas)
        self.train(base.training)

    @property
    def base(self) -> FeedForward:
        """The layer without deltas; it shares the parameters."""
        return self._base[0]

    def forward(self, x: Tensor, signals: Signals | None = None, carry: Any = None) -> Any:
        both = linear(x, self.gate_up)
        deltas = [self._delta(name, x, signals) for name in ("gate", "up")]
        if any(d is not None for d in deltas):
            # both in one tensor, as the base has them: activations of other strides differ in the last bit
            nothing = both.new_zeros((*both.shape[:-1], both.shape[-1] // 2))
            both = both + torch.cat([nothing if d is None else d for d in deltas], -1)
        gate, up = both.chunk(2, dim=-1)
        inner = self.activation(gate) * up
        y, delta = linear(inner, self.down), self._delta("down", inner, signals)
        return y if delta is None else y + delta, Carry() if carry is None else carry, Trail()

    def _delta(self, name: str, x: Tensor, signals: Signals | None) -> Tensor | None:
        return self.deltas[name](x, signals=signals) if name in self.deltas else None

    def unload(self) -> FeedForward:
        """The base, apart from this module, with the weights as they are now."""
        base = self.base
        base._parameters = dict(self._parameters)
        return base

    def part(self, name: str) -> Tensor:
        """The matrix [O, I] of a part, as a view."""
        if name == "down":
            return self.down
        width = self.gate_up.shape[0] // 2
        return self.gate_up[:width] if name == "gate" else self.gate_up[width:]

    def param_info(self) -> dict[str, ParamInfo]:
        return self.base.param_info()

    def extra_backward_flops(self, seq_len: int) -> int:
        return -self.extra_flops(seq_len)
