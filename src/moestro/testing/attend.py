"""An attention for tests of routers that look at one: an explicit map, as an operator on the units."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Map", "causal_map"]


class Map:
    """v [T, C] -> A v [T, C] for an explicit A [T, T], in the dtype of v; of one head, which adds nothing."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def __call__(self, v: Tensor, weight: Tensor | None = None) -> Tensor:
        made = self.matrix.to(v.device, v.dtype) @ v
        return made if weight is None else made * weight

    def contributions(self) -> Tensor:
        return self.matrix.new_zeros(self.matrix.shape[0], 1, 1)

    def take(self, index: Tensor) -> Map:
        """The map among some of the units, which see nobody else."""
        return Map(self.matrix[index][:, index])

    def spread(self, units: int, place: Tensor) -> Map:
        """The map of these units at other places among `units`; all others see themselves."""
        matrix = torch.eye(units)
        matrix[place[:, None], place] = self.matrix
        return Map(matrix)


def causal_map(segment: Tensor, valid: Tensor | None = None) -> Map:
    """Every unit sees the valid ones of its segment up to itself, unequally; padding sees itself.

    segment [T] int64, units of a segment in their order; valid [T] bool.
    """
    place = torch.arange(segment.shape[0])
    seen = (segment[:, None] == segment) & (place <= place[:, None])
    if valid is not None:
        seen = (seen & valid) | torch.eye(segment.shape[0], dtype=torch.bool)
        seen &= valid[:, None] | (place == place[:, None])
    score = (0.5 + torch.sin(place.float() * 1.7)[None] * 0.5).masked_fill(~seen, float("-inf"))
    return Map(score.softmax(-1))
