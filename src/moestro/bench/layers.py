"""Layers that solve the same problem in different ways: ours, the plain loop, transformers' experts, dense bars."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.plan import Plan
from ..core.rows import Rows
from ..experts.config import Gated
from ..ops.expert_mlp import by_expert, stacked
from ..ops.expert_mlp.problem import Problem, Wanted
from ..ops.rows import rows
from .peers import Absent, transformers_experts
from .problem import Shape, Weights, plain_loop

__all__ = ["OURS", "Layer", "makers", "our_bank"]

OURS, TOUCHED, DETERMINISTIC = "moestro", "moestro, touched experts only", "moestro, deterministic"
TORCH_PATH, LOOP = "moestro, torch path", "loop, unbind"
PEERS = {
    "transformers grouped_mm": ("grouped_mm", False),
    "transformers grouped_mm compiled": ("grouped_mm", True),
    "transformers batched_mm": ("batched_mm", False),
    "transformers batched_mm compiled": ("batched_mm", True),
    "transformers eager": ("eager", False),
}
EVERYWHERE = ("dense, width K*F", "dense products, width K*F")  # bars that goals compare with, under every routing
COPIES = 2**31  # bytes of weights that batched_mm may copy
CHOICES = 1024  # choices up to which one product for each is worth compiling


@dataclasses.dataclass(frozen=True)
class Layer:
    """run(x [T, D], expert [T, K], weight [T, K]) -> y [T, D].

    leaves: what gets gradients, under the names gate_up and down where they are those of the problem. bar: it computes
    another function of equal cost, there is nothing to check.
    """

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    leaves: Mapping[str, Tensor]
    compiled: bool = False
    bar: bool = False

    def clear(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    def grads(self) -> dict[str, Tensor | None]:
        """Dense, whatever they are."""
        found = {name: leaf.grad for name, leaf in self.leaves.items()}
        return {name: g.to_dense() if g is not None and g.is_sparse else g for name, g in found.items()}


Maker = Callable[[], Layer]


def makers(shape: Shape, shared: Weights, backward: bool, peers: bool) -> dict[str, Maker]:
    """Name -> function that builds the layer, or raises `Absent`. peers: transformers' too."""
    made: dict[str, Maker] = {OURS: lambda: _bank_layer(our_bank(shared), shape)}
    if backward and shape.tokens == 1:
        made[TOUCHED] = lambda: _bank_layer(our_bank(shared, sparse_grad=True), shape)
    made[DETERMINISTIC] = lambda: _bank_layer(our_bank(shared, deterministic=True), shape)
    made[TORCH_PATH] = lambda: _torch_path(shape, shared)
    made[LOOP] = lambda: _loop(shared)
    if peers:
        for name, (implementation, compiled) in PEERS.items():
            made[name] = lambda i=implementation, c=compiled: _transformers(shape, shared, i, c, backward)
    made["dense, width K*F"] = lambda: _dense(shape, shared, shape.top_k * shape.width)
    made["dense, width E*F"] = lambda: _dense(shape, shared, shape.experts * shape.width)
    if shared.down.device.type == "cuda":
        made["dense products, width K*F"] = lambda: _products(shape, shared, shape.top_k * shape.width)
    return made


def our_bank(shared: Weights, sparse_grad: bool = False, deterministic: bool = False) -> Any:
    """Our bank of gated experts on these very tensors."""
    E, D, width = shared.down.shape
    with torch.device("meta"):
        bank = Gated(width=width, sparse_grad=sparse_grad, deterministic=deterministic).build(dim=D, num_experts=E)
    bank.gate_up, bank.down = nn.Parameter(shared.gate_up), nn.Parameter(shared.down)
    return bank


def plan_of(expert: Tensor, weight: Tensor, experts: int) -> Plan:
    return Plan(expert=expert, weight=weight, num_experts=experts, complete=True)


def _bank_layer(bank: Any, shape: Shape) -> Layer:
    def run(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return bank.mixture(x, plan_of(expert, weight, shape.experts))

    return Layer(run, {"gate_up": bank.gate_up, "down": bank.down})


def _torch_path(shape: Shape, shared: Weights) -> Layer:
    """What ours is where there is no compiler: the first torch backend that takes the problem."""
    leaves = {"gate_up": nn.Parameter(shared.gate_up), "down": nn.Parameter(shared.down)}

    def run(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        index = rows(plan_of(expert, weight, shape.experts))
        return _ByTorch.apply(x, weight, leaves["gate_up"], leaves["down"], index)  # type: ignore[return-value]

    return Layer(run, leaves)


class _ByTorch(torch.autograd.Function):
    """A backend called as the registered op calls it, without the choice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, index: Rows) -> Tensor:
        ctx.problem = Problem(
            x=x,
            first=gate_up,
            down=down,
            offsets=index.offsets,
            activation="silu",
            gated=True,
            unit=index.unit,
            slot=index.slot,
            inverse=index.inverse,
            weight=weight,
        )
        backend: Any = next(b for b in (stacked, by_expert) if b.supported(ctx.problem.spec())[0])
        save = any(ctx.needs_input_grad)
        y, hidden = backend.forward(ctx.problem, save)
        if save:
            ctx.backend, ctx.hidden = backend, hidden
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.backend.backward(ctx.problem, ctx.hidden, grads[0].contiguous(), Wanted())
        return found.x, found.weight, found.first, found.down, None


def _loop(shared: Weights) -> Layer:
    leaves = {"gate_up": nn.Parameter(shared.gate_up), "down": nn.Parameter(shared.down)}
    return Layer(lambda x, expert, weight: plain_loop(x, expert, weight, *leaves.values()), leaves)


def _transformers(shape: Shape, shared: Weights, implementation: str, compiled: bool, backward: bool) -> Layer:
    if implementation == "batched_mm":
        choices = shape.tokens * shape.top_k
        copied = choices * shape.expert_bytes * (2 if backward else 1)
        if not compiled and copied > COPIES:
            raise Absent(f"it copies the weights of every choice, here {copied / 2**30:.1f} GiB")
        if compiled and choices > CHOICES:
            raise Absent(f"one product for each of {choices} choices: not meant for so many")
    experts: Any = transformers_experts(shared.gate_up, shared.down, implementation)
    call = experts
    if compiled:
        torch._dynamo.reset()  # else the limit of recompilations of one function would stop later shapes
        call = torch.compile(experts, dynamic=False)
    leaves = {"gate_up": experts.gate_up_proj, "down": experts.down_proj}
    return Layer(lambda x, expert, weight: call(x, expert, weight.to(x.dtype)), leaves, compiled=compiled)


def _dense_leaves(shape: Shape, shared: Weights, width: int) -> dict[str, Tensor]:
    def draw(*size: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*size, dtype=shared.down.dtype, device=shared.down.device) / math.sqrt(size[1]))

    return {"first": draw(2 * width, shape.dim), "second": draw(shape.dim, width)}


def _dense(shape: Shape, shared: Weights, width: int) -> Layer:
    leaves = _dense_leaves(shape, shared, width)

    def run(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        gate, up = F.linear(x, leaves["first"]).chunk(2, dim=1)
        return F.linear(F.silu(gate) * up, leaves["second"])

    return Layer(run, leaves, bar=True)


def _products(shape: Shape, shared: Weights, width: int) -> Layer:
    """The matrix products of the dense layer and nothing between them."""
    leaves = _dense_leaves(shape, shared, width)

    def run(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return F.linear(F.linear(x, leaves["first"])[:, :width], leaves["second"])

    return Layer(run, leaves, bar=True)
