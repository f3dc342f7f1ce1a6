"""Additive statistics: what a loss needs of a plan, summable over micro-batches, passes and ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from .errors import UserError
from .pytree import pytree

__all__ = ["Stats"]


@pytree
@dataclasses.dataclass(frozen=True)
class Stats:
    """Named sums. `a + b` adds them name by name; integer sums stay integer.

    A loss is a function of such sums, so its value over several micro-batches or ranks is its value at the sum.
    """

    sums: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[name]

    def __add__(self, other: Stats) -> Stats:
        if self.sums.keys() != other.sums.keys():
            raise UserError(f"cannot add statistics {sorted(self.sums)} and {sorted(other.sums)}")
        return Stats({name: value + other.sums[name] for name, value in self.sums.items()})

    def detach(self) -> Stats:
        return Stats({name: value.detach() for name, value in self.sums.items()})

    def within(self, total: Stats) -> Stats:
        """The value of `total`, with the gradient of this part of it.

        For any function f of the sums, adding up the gradients of f(part.within(total)) over all parts gives the
        gradient of f(total): this is how balance losses over micro-batches and ranks are exact.
        """
        pooled: dict[str, Tensor] = {}
        for name, value in self.sums.items():
            whole = total.sums[name].detach()
            pooled[name] = value + (whole - value.detach()) if value.requires_grad else whole
        return Stats(pooled)
