"""The layer of experts weights averaging: experts in training, their mean in evaluation."""

from __future__ import annotations

from torch import Tensor

from ..core.plan import AnyPlan
from ..core.signals import Signals
from .layer import MoELayer
from .units import all_to_one, masked

__all__ = ["AveragedExperts"]


class AveragedExperts(MoELayer):
    """In training each unit meets the expert that it is dealt to; in evaluation all units meet the mean of the experts.

    Shapes: as `MoELayer`, with a stacked bank of equal widths. The hook `optim.averaging.ExpertAveraging` pulls the
    experts together after every step; `convert` turns the layer into the dense one that evaluation shows.
    Source: 48, Experts Weights Averaging (arXiv 2308.06093), random uniform partition and the averaged model.
    """

    def run(self, units: Tensor, plan: AnyPlan, valid: Tensor | None = None, signals: Signals | None = None) -> Tensor:
        if self.training:
            return super().run(units, plan, valid, signals)
        mean = {name: p.mean(0, keepdim=True) for name, p in self.experts.named_parameters(recurse=False)}
        return masked(self.experts(units, all_to_one(units.shape[0], units.device), weights=mean), valid)
