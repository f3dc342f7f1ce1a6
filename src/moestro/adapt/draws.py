"""Dropout of adapters: stateless draws, by seed, place and unit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.draws import fold, uniform
from ..core.signals import Signals

__all__ = ["Place", "drop", "reseed"]


class Place(nn.Module):
    """Where draws belong: the adapter's seed, its path in the model, and a number that callers may advance.

    A module without parameters, because torch.compile takes numbers of modules for constants.

    In Moestro's models the seed of the signals differs from step to step. Models of others give no signals: there,
    `reseed(model, step)` before each forward pass makes the draws differ.
    """

    def __init__(self, seed: int, path: str) -> None:
        super().__init__()
        self.base = fold(seed, path)
        self.round = 0

    def seed(self, signals: Signals | None, name: str) -> Tensor | int:
        """The seed of one draw of this pass."""
        given = 0 if signals is None else signals.seed
        return fold(fold(fold(fold(self.base, self.round), "signals") ^ given, "draw"), name)


def unit_ids(signals: Signals | None, T: int, device: torch.device) -> Tensor:
    """[T] int64 ids of the units: those of the signals, or 0..T-1."""
    if signals is not None and signals.unit_id is not None and signals.unit_id.shape[0] == T:
        return signals.unit_id
    return torch.arange(T, device=device)


def drop(x: Tensor, rate: float, place: Place, signals: Signals | None, name: str, ids: Tensor) -> Tensor:
    """x [R, N] with each entry set to 0 with probability `rate`, the others divided by 1 - rate. ids: [R] int64."""
    return x * _factors(rate, place, signals, name, ids, x.shape[1]).to(x.dtype)  # pyright: ignore[reportCallIssue]


@torch.compiler.disable  # where a graph breaks, seeds that differ by layer become symbols, and their hash never ends
def _factors(rate: float, place: Place, signals: Signals | None, name: str, ids: Tensor, width: int) -> Tensor:
    return (uniform(place.seed(signals, name), ids, width) >= rate).float() / (1 - rate)


def reseed(model: nn.Module, number: int) -> None:
    """Draw other dropout masks from now on: call it with the number of the step (and micro-batch)."""
    for place in model.modules():
        if isinstance(place, Place):
            place.round = number
