"""What routed experts are asked for: the tensors (`Problem`), what backends see of them (`Spec`), and the gradients."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import Clamp

__all__ = ["Grads", "Problem", "Spec", "Wanted"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """y[t] = sum over k of weight[t, k] * expert_e(x[t]), e the expert of row r = inverse[t, k]; -1 adds nothing.

    Shapes:
        x: [T, D]. offsets: [E+1] int64, rows of expert e are offsets[e]..offsets[e+1].
        unit: [R] int64 the unit of each row; slot: [R] int64 its column of `inverse`; inverse: [T, K] int64.
        weight: [T, K]. All four are None where x is the sorted rows themselves: then y is [R, D], one row each.
        first: [E, F, D], or gated [E, 2F, D] with the gate's rows first. down: [E, D, F].
        first_bias: [E, F], or gated [E, 2F], or None; down_bias: [E, D] or None; for equal widths only.
    Unequal widths F_e (gated only): first [sum 2F_e, D] and down, transposed, [sum F_e, D], block after block.

    All floating tensors have one dtype and lie on one device, except `weight`, which may be fp32 beside bf16.
    deterministic: a row's result may not depend, to the last bit, on which other rows there are.
    sparse_grad: gradients of parameters are sparse tensors over the expert axis that hold touched experts only.
    clamp: gated experts only; the gated unit is that of `activations.Clamp`.
    """

    x: Tensor
    first: Tensor
    down: Tensor
    offsets: Tensor
    activation: str
    gated: bool
    unit: Tensor | None = None
    slot: Tensor | None = None
    inverse: Tensor | None = None
    weight: Tensor | None = None
    first_bias: Tensor | None = None
    down_bias: Tensor | None = None
    widths: tuple[int, ...] | None = None
    deterministic: bool = False
    sparse_grad: bool = False
    clamp: Clamp | None = None

    @property
    def num_rows(self) -> int:
        """R."""
        return self.x.shape[0] if self.unit is None else self.unit.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.first.shape[0] if self.widths is None else len(self.widths)

    @property
    def width(self) -> int:
        """F, the widest where widths differ."""
        return self.down.shape[2] if self.widths is None else max(self.widths, default=0)

    def hidden_shape(self) -> tuple[int, int]:
        """[R, 2F] for gated experts, [R, F] for plain ones: what a forward pass may keep for the backward pass.

        One shape for all backends, so that the op has a shape without looking at data; the memory is a backend's own to
        lay out. Where widths differ, F is the widest; a backend fills what it needs, from the start.
        """
        return self.num_rows, (2 if self.gated else 1) * self.width

    def row_weights(self) -> Tensor | None:
        """[R]: the weight of each row's choice, or None where there is none to combine with."""
        if self.weight is None:
            return None
        return self.weight.reshape(-1).index_select(0, self.places())

    def places(self) -> Tensor:
        """[R] int64: where each row's choice lies in the flattened `inverse` and `weight`. Distinct."""
        assert self.unit is not None
        assert self.slot is not None
        assert self.inverse is not None
        return self.unit * self.inverse.shape[1] + self.slot

    def spec(self) -> Spec:
        """What backends see."""
        cuda = self.x.device.type == "cuda"
        return Spec(
            device=self.x.device.type,
            dtype=self.x.dtype,
            rows=self.num_rows,
            dim=self.x.shape[1],
            width=self.width,
            experts=self.num_experts,
            activation=self.activation,
            gated=self.gated,
            biased=self.first_bias is not None or self.down_bias is not None,
            unequal=self.widths is not None,
            mixture=self.unit is not None,
            deterministic=self.deterministic,
            clamped=self.clamp is not None,
            capability=torch.cuda.get_device_capability(self.x.device) if cuda else (0, 0),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """rows R, dim D, width F (the widest), experts E; capability: of a CUDA device. mixture: gather and combine too."""

    device: str
    dtype: torch.dtype
    rows: int
    dim: int
    width: int
    experts: int
    activation: str = "silu"
    gated: bool = True
    biased: bool = False
    unequal: bool = False
    mixture: bool = True
    deterministic: bool = False
    clamped: bool = False
    capability: tuple[int, int] = (0, 0)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    x: bool = True
    weight: bool = True
    first: bool = True
    down: bool = True
    first_bias: bool = False
    down_bias: bool = False


class Grads(NamedTuple):
    """The gradients of a `Problem`, None where not wanted. Experts without rows have exact zeros."""

    x: Tensor | None = None
    weight: Tensor | None = None
    first: Tensor | None = None
    down: Tensor | None = None
    first_bias: Tensor | None = None
    down_bias: Tensor | None = None
