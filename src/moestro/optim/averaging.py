"""Experts weights averaging: after every optimiser step, experts are moved towards their mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.params import describe
from .config import ExpertAveraging as ExpertAveragingConfig

__all__ = ["ExpertAveraging", "average_"]


@torch.no_grad()
def average_(stack: Tensor, share: float) -> None:
    """W_i <- (1 - b) W_i + b / (N - 1) * sum of the others, in place.

    Shapes: stack [N, ...], one entry per expert; share b in [0, 1). The mean stays, deviations from it shrink by
    1 - b N / (N - 1); b = (N - 1) / N makes all experts equal. One expert stays as it is. Source: 48, step 3.
    """
    N = stack.shape[0]
    if N > 1 and share:
        stack.lerp_(stack.mean(0, keepdim=True).expand_as(stack), share * N / (N - 1))


class ExpertAveraging:
    """A hook after the step that averages every bank of experts. Moments of the optimiser are left alone.

    Raises `UserError` for a model without a stacked bank.
    """

    def __init__(self, config: ExpertAveragingConfig, model: nn.Module, steps: int) -> None:
        self.config, self.steps = config, steps
        infos = describe(model)
        named = [(n, p) for n, p in model.named_parameters() if infos[n].role == "expert"]
        self.stacks = [p for n, p in named if infos[n].expert_axis == 0]
        if not self.stacks or len(self.stacks) != len(named):
            raise UserError(
                "ExpertAveraging: averages experts of equal widths that are stacked; this model has "
                + ("experts that are not" if named else "no routed experts")
            )

    def __call__(self, step: int, counts: Mapping[str, Tensor]) -> None:
        share = self.config.at(step, self.steps)
        for stack in self.stacks:
            average_(stack, share)
