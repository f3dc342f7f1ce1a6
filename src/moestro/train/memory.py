"""What a training step holds besides the model: gradients, optimiser state, activations; measured by making one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..core.memory import saved
from ..optim.config import AdamW, Optimizer

__all__ = ["StepMemory", "step_memory"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Of one training step. trained: numbers that train. The others are bytes: of all parameters and buffers, of the
    gradients, of the optimiser's state, and of the activations that are kept for the backward pass."""

    trained: int
    model: int
    gradients: int
    optimizer: int
    activations: int


def step_memory(model: Any, loss: Callable[[Any], Tensor], optimizer: Optimizer | None = None) -> StepMemory:
    """Measured in one step of a copy of the model, which stays as it is.

    loss: model -> a scalar, as in training. optimizer: default AdamW. Counted from configs instead: `models.growth`.
    """
    twin: nn.Module = copy.deepcopy(model).train()
    twin.zero_grad(set_to_none=True)
    with saved(twin) as kept:
        value = loss(twin)
    activations = kept.bytes
    value.backward()
    made = (optimizer or AdamW()).build(twin)
    gradients = sum(_bytes(p.grad) for p in twin.parameters() if p.grad is not None)
    made.step(1.0)
    return StepMemory(
        trained=sum(p.numel() for p in twin.parameters() if p.requires_grad),
        model=sum(map(_bytes, (*twin.parameters(), *twin.buffers()))),
        gradients=gradients,
        optimizer=sum(map(_bytes, made.to_tensors().values())),
        activations=activations,
    )


def _bytes(tensor: Tensor) -> int:
    held = tensor._values() if tensor.is_sparse else tensor
    return held.numel() * held.element_size()
