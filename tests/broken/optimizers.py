"""Failure 9: an optimiser that takes a stack of experts for one matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.optim.muon import orthogonalised


class TakesTheStackForAMatrix:
    """Orthogonalises [E, A, B] as [E * A, B], as reshaping until the shape fits does."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())

    def matrix(self, p: Tensor) -> Tensor:
        return p.reshape(1, -1, p.shape[-1])

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for p in self.parameters:
            if p.grad is not None:
                p.sub_(orthogonalised(self.matrix(p.grad)).view_as(p), alpha=0.1 * factor)

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None


class TakesFusedPartsForAMatrix(TakesTheStackForAMatrix):
    """Knows experts, but not that gate and up are two matrices."""

    def matrix(self, p: Tensor) -> Tensor:
        return p.reshape(-1, *p.shape[-2:])
