"""Tensors that are functions of a config: never cast with the model, never saved, rebuilt where the model goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["Constants"]


class Constants(nn.Module):
    """A module whose buffers follow from its config alone.

    `compute` returns them in full precision. They are rebuilt after every move or cast of the model, so `.to(bf16)`
    does not round them and a model made on the meta device gets real ones with `to_empty`.
    """

    def compute(self) -> dict[str, Tensor]:
        """name -> tensor, on the CPU."""
        raise NotImplementedError

    def make_constants(self, device: torch.device | str | None = None) -> None:
        """(Re)build the buffers, on `device` or on the default one."""
        with torch.device("cpu"):
            made = self.compute()
        where = torch.get_default_device() if device is None else device
        for name, value in made.items():
            self.register_buffer(name, value.to(where), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        devices: set[Any] = {b.device for b in self.buffers(recurse=False)}
        for device in devices:
            self.make_constants(device)
        return self
