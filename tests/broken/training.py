"""Failures 2, 5 and 6: counters that drift, a norm that depends on the layout, a load that leaves weights random."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moestro.core.carry import Carry
from moestro.core.plan import demand
from moestro.core.signals import Signals

from .routers import RoutesAgain


class CountsInForward(nn.Module):
    """A layer that adds to a buffer whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.router = RoutesAgain(dim=8, num_experts=4)
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        plan, _ = self.router(x, Signals(), Carry())
        self.count += demand(plan).to(self.count.dtype)
        return x * plan.weight.sum(1, keepdim=True)


def drifting(which: str):
    """Counts of the layer above; `which` names the one way of the check that it is exposed to."""

    def counts(*, micro_batches=1, checkpointing=False, evaluations=0, cast=False) -> dict[str, Tensor]:
        layer = CountsInForward()
        x = torch.randn(4 * 600, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        if cast and which == "cast":
            layer = layer.to(torch.bfloat16)
            x = x.detach().to(torch.bfloat16).requires_grad_()
        with torch.no_grad():
            layer.router.score.weight.copy_(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))
            if which == "evaluations":
                for _ in range(evaluations):
                    layer.eval()(x)
        for part in x.chunk(micro_batches):
            if checkpointing and which == "checkpointing":
                checkpoint(layer, part, use_reentrant=False).sum().backward()
            else:
                layer(part).sum().backward()
        if which == "accumulation" and micro_batches > 1:
            return {"layer": layer.count / micro_batches}
        return {"layer": layer.count if which == "cast" and cast else layer.count.long()}

    return counts


def mean_of_group_norms(grads: list[Tensor]) -> float:
    """Every group clipped by itself, then averaged."""
    return float(torch.stack([g.norm() for g in grads]).mean() * len(grads) ** 0.5)


def load_what_fits(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Reports success whatever happened."""
    own = model.state_dict()
    model.load_state_dict({n: t for n, t in tensors.items() if n in own and t.shape == own[n].shape}, strict=False)
