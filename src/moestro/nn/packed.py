"""Linear maps and dense MLPs whose matrices are packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..core.account import Cost
from ..core.carry import Carry
from ..core.errors import UserError
from ..core.signals import Signals
from ..core.trail import Trail
from ..ops.packed import Kind, Packed, pack, packed_linear, unpack
from ..ops.packed.buffers import apply_keeping, check_kinds
from .feedforward import FeedForward

__all__ = ["PackedFeedForward", "PackedLinear"]


class PackedLinear(nn.Module):
    """x w^T + bias with w in bf16, or blocks of int8 or int4, made from an `nn.Linear`. It has no gradient.

    Shapes: x [..., I] -> [..., O]. The matrix is kept as the buffers `data` and `scale`, the bias as it was; they move
    with the module, and keep their format whatever dtype it is cast to. weight: the matrix unpacked, [O, I] fp32, made
    at every reading, for those who want it whole.
    """

    def __init__(self, source: nn.Linear, kind: Kind) -> None:
        super().__init__()
        if not isinstance(source, nn.Linear):
            raise UserError(f"PackedLinear: made from an nn.Linear, not from {type(source).__name__}")
        self.kind: Kind = kind
        self.in_features, self.out_features = source.in_features, source.out_features
        packed = pack(source.weight, kind)
        self.register_buffer("data", packed.data)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().clone())
        if hasattr(source, "role"):
            self.role = source.role
        self.train(source.training)

    @property
    def packed(self) -> Packed:
        """The matrix as it is kept."""
        return Packed(self.kind, self.data, self.scale, self.in_features)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        return unpack(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        y = packed_linear(x, self.packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # type: ignore[operator]

    def cost(self, seq_len: int = 1) -> Cost:
        matrix = self.in_features * self.out_features
        numbers = matrix + (0 if self.bias is None else self.out_features)
        return Cost(numbers, numbers, 2 * matrix)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        apply_keeping(self, lambda: super(PackedLinear, self)._apply(fn, recurse))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        check_kinds(self, state_dict, prefix, rest[-1])
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PackedFeedForward(nn.Module):
    """The dense gated MLP of a `FeedForward`, both matrices packed. It has no gradient.

    `(x [..., D], signals, carry) -> (y, carry, trail)`, the trail empty.
    """

    role = "dense"

    def __init__(self, source: FeedForward, kind: Kind) -> None:
        super().__init__()
        self.config, self.kind, self.activation = source.config, kind, source.activation
        self.gate_up, self.down = (PackedLinear(_linear(w), kind) for w in (source.gate_up, source.down))
        self.train(source.training)

    def forward(
        self, x: Tensor, signals: Signals | None = None, carry: Carry | None = None
    ) -> tuple[Tensor, Carry, Trail]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up), Carry() if carry is None else carry, Trail()


def _linear(matrix: nn.Parameter) -> nn.Linear:
    made = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    made.weight = matrix
    return made
