"""Packed copies that belong to a tensor as it is now: made again once it has changed."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ..ops.packed import Kind, Packed, pack

__all__ = ["Tied"]

_SAMPLES = 512  # weights compared at every call; at least one of every entry along the first axis


class Tied:
    """The packed copy of a live tensor.

    Made again when the tensor is another object, or has another version (every in-place operation that autograd counts:
    optimisers, `load_state_dict`, `copy_` and arithmetic under no_grad), memory, dtype, device, shape or strides.

    What is written through `tensor.data`, or by others into its memory, leaves all of these as they were. For that, at
    least one weight of every expert, 512 in all, is compared at every call. So a write to all weights of an expert is
    noticed; one that misses the compared weights is not: call `forget` after it. A tensor made under
    `torch.inference_mode` has no version, and only the comparison.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.forget()

    def forget(self) -> None:
        """Make the copy again at the next call."""
        self._made: Packed | None = None
        self._of: weakref.ref[Tensor] | None = None
        self._state: tuple[object, ...] = ()
        self._places = self._seen = torch.empty(0)

    def __call__(self, tensor: Tensor) -> Packed:
        """The packed copy of the tensor as it is now."""
        state = _state(tensor)
        same = self._made is not None and self._of is not None and self._of() is tensor and self._state == state
        if not same or not torch.equal(self._sample(tensor), self._seen):
            self._made = pack(tensor, self.kind)
            self._of, self._state = weakref.ref(tensor), state
            self._places = _places(tensor)
            self._seen = self._sample(tensor)
        assert self._made is not None
        return self._made

    def _sample(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_contiguous():
            return tensor.view(-1).index_select(0, self._places)
        return tensor.flatten(1)[:, ::61].clone()

    def __deepcopy__(self, memo: object) -> Tied:
        return Tied(self.kind)

    def __reduce__(self) -> tuple[type[Tied], tuple[Kind]]:
        return Tied, (self.kind,)


def _state(tensor: Tensor) -> tuple[object, ...]:
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _places(tensor: Tensor) -> Tensor:
    """Places in a contiguous tensor, spread unevenly over every entry of its first axis."""
    E = max(1, tensor.shape[0])
    size = tensor.numel() // E
    each = min(size, -(-_SAMPLES // E))
    steps = torch.arange(each, device=tensor.device)
    inside = (steps * size // max(1, each) + steps * 7919 % max(1, size // max(1, each))).clamp_max(max(0, size - 1))
    return (torch.arange(E, device=tensor.device)[:, None] * size + inside).flatten()
