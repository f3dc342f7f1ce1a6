"""The problem that all layers in a benchmark solve: weights, inputs, and the answer in float64."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.pages import large_pages
from .routings import routing

__all__ = ["Answer", "Inputs", "Shape", "Weights", "distance", "inputs", "plain_loop", "reference", "weights"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """tokens T, dim D, width F, experts E, top_k K."""

    tokens: int
    dim: int
    width: int
    experts: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """Of one expert in fp32."""
        return 3 * 4 * self.dim * self.width

    @property
    def flops(self) -> int:
        """Of the matrix products of a forward pass."""
        return 6 * self.tokens * self.top_k * self.dim * self.width


@dataclasses.dataclass(frozen=True)
class Weights:
    """gate_up [E, 2F, D], down [E, D, F]: one copy in memory, shared by every contender that can use it as it is."""

    gate_up: Tensor
    down: Tensor


@dataclasses.dataclass(frozen=True)
class Inputs:
    """x [T, D], expert [T, K] int64, weight [T, K] fp32, grad [T, D]: the gradient of the output."""

    x: Tensor
    expert: Tensor
    weight: Tensor
    grad: Tensor


@dataclasses.dataclass(frozen=True)
class Answer:
    """The output, and gradients by name (x, weight, gate_up, down), float64; no gradients for forward passes."""

    y: Tensor
    grads: dict[str, Tensor]


def weights(shape: Shape, seed: int, device: torch.device, dtype: torch.dtype) -> Weights:
    """Normal values of standard deviation 1 / sqrt(inputs), in large pages as a bank's are, for all contenders."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return large_pages(torch.randn(*size, generator=generator).div_(math.sqrt(size[-1])).to(device, dtype))

    E, D, F = shape.experts, shape.dim, shape.width
    return Weights(draw(E, 2 * F, D), draw(E, D, F))


def inputs(shape: Shape, kind: str, seed: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Normal x and output gradient, with a routing of that kind."""
    generator = torch.Generator().manual_seed(seed)
    expert, weight = routing(kind, shape.tokens, shape.experts, shape.top_k, generator)
    x, grad = (torch.randn(shape.tokens, shape.dim, generator=generator).to(device, dtype) for _ in range(2))
    return Inputs(x, expert.to(device), weight.to(device), grad)


def plain_loop(x: Tensor, expert: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What one writes without a library: expert by expert, over stacked weights taken apart with `unbind`."""
    y = torch.zeros_like(x)
    flat = expert.reshape(-1)
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=gate_up.shape[0]).tolist()
    scale = weight.reshape(-1, 1).to(x.dtype)
    for place, first, second in zip(order.split(counts), gate_up.unbind(0), down.unbind(0)):
        if len(place) == 0:
            continue
        unit = place // expert.shape[1]
        gate, up = F.linear(x.index_select(0, unit), first).chunk(2, dim=1)
        y = y.index_add(0, unit, F.linear(F.silu(gate) * up, second) * scale.index_select(0, place))
    return y


def reference(given: Inputs, shared: Weights, backward: bool) -> Answer:
    """The answer, by the plain loop in float64, on the very values that contenders get."""
    leaves = {
        "x": given.x,
        "weight": given.weight,
        "gate_up": shared.gate_up,
        "down": shared.down,
    }
    leaves = {name: t.detach().double().requires_grad_(backward) for name, t in leaves.items()}
    y = plain_loop(leaves["x"], given.expert, leaves["weight"], leaves["gate_up"], leaves["down"])
    if not backward:
        return Answer(y, {})
    y.backward(given.grad.double())
    return Answer(y.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance, in float64; infinite where something is not finite or of another shape."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.detach().to(expected.device).double(), expected.double()
    apart = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    return apart if math.isfinite(apart) else math.inf
