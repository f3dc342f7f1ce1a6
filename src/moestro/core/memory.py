"""What a forward pass keeps for the backward pass, in bytes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["Saved", "saved"]


@dataclasses.dataclass
class Saved:
    """bytes: of all tensors that are kept, each storage once, parameters and buffers left out."""

    bytes: int = 0
    _seen: set[int] = dataclasses.field(default_factory=set)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
        if storage is None or storage.data_ptr() in self._seen:
            return
        self._seen.add(storage.data_ptr())
        self.bytes += storage.nbytes()


@contextlib.contextmanager
def saved(model: nn.Module) -> Iterator[Saved]:
    """Counts what autograd keeps of the passes that run inside: the activations of a training step.

    A part without anything to train, whose input needs no gradient either, keeps nothing. Count a whole pass, and run
    its backward after it has been counted: what is freed meanwhile may be counted as the same storage.
    """
    found = Saved()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.layout == torch.strided:
            found._seen.add(tensor.untyped_storage().data_ptr())

    def pack(tensor: Tensor) -> Tensor:
        found.add(tensor)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
