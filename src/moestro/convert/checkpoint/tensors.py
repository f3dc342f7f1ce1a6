"""Named tensors that are read when they are needed: of a folder, of a model, of a dict."""

from __future__ import annotations

import math
from collections.abc import ItemsView, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

__all__ = ["DictTensors", "Entry", "ModelTensors", "Tensors", "finite"]

_BLOCK = 1 << 22


class Entry(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class Tensors(Protocol):
    """Tensors by name. What `read` returns may be memory-mapped or somebody's parameter: nobody writes into it."""

    def entries(self) -> Mapping[str, Entry]: ...

    def read(self, name: str) -> Tensor: ...


class DictTensors:
    """The tensors of a mapping."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}

    def entries(self) -> Mapping[str, Entry]:
        return {name: Entry(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def items(self) -> ItemsView[str, Tensor]:
        return self._tensors.items()


class ModelTensors(DictTensors):
    """Parameters and persistent buffers of a model; a tensor that has several names appears under the first."""

    def __init__(self, model: nn.Module) -> None:
        seen: set[int] = set()
        own: dict[str, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                own[name] = tensor
        super().__init__(own)


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; never makes a copy of more than a few megabytes."""
    if not tensor.dtype.is_floating_point or tensor.is_meta or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        return not any(bool(part.float().isnan().any()) for part in _parts(tensor))
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())  # both are NaN where one entry is


def _parts(tensor: Tensor) -> list[Tensor]:
    if tensor.numel() <= _BLOCK or not tensor.ndim:
        return [tensor]
    if tensor.is_contiguous():
        return list(tensor.view(-1).split(_BLOCK))
    return [part for row in tensor.unbind(0) for part in _parts(row)]
