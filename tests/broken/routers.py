"""Failures 3, 7 and 8: routers that route again when recomputed, route padding, or choose in low precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.carry import Carry, Replay
from moestro.core.plan import Plan
from moestro.core.signals import Signals
from moestro.ops.choice import commit


class Naive(nn.Module):
    """A correct top-2 router written plainly; the broken ones below change one thing each."""

    causal = True

    def __init__(self, dim: int = 16, num_experts: int = 8) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.score = nn.Linear(dim, num_experts, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return nn.functional.linear(x.to(wide), self.score.weight.to(wide))

    def decide(self, probs: Tensor, valid: Tensor) -> Tensor:
        chosen = torch.sort(probs, dim=1, descending=True, stable=True).indices[:, :2]
        return commit(torch.where(valid[:, None], chosen, -1))

    def valid(self, x: Tensor, signals: Signals) -> Tensor:
        return signals.valid if signals.valid is not None else torch.ones(x.shape[0], dtype=torch.bool)

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Plan, Carry]:
        logits = self.logits(x)
        probs = logits.softmax(-1)
        valid = self.valid(x, signals)
        fixed = carry.mine
        expert = fixed.plan.expert if isinstance(fixed, Replay) else self.decide(probs, valid)
        weight = torch.gather(probs, 1, expert.clamp_min(0)) * (expert >= 0)
        return Plan(
            expert=expert, weight=weight, num_experts=self.num_experts, probs=probs, logits=logits, valid=valid
        ), carry


class RoutesAgain(Naive):
    """The decision is taken anew by whoever recomputes."""

    def decide(self, probs: Tensor, valid: Tensor) -> Tensor:
        chosen = torch.sort(probs, dim=1, descending=True, stable=True).indices[:, :2]
        return torch.where(valid[:, None], chosen, -1)


class DrawsAgain(Naive):
    """Exploration noise from the global generator."""

    def decide(self, probs: Tensor, valid: Tensor) -> Tensor:
        return super().decide(probs + torch.rand_like(probs) * 0.5, valid)


class RoutesPadding(Naive):
    """The mask never reaches the router."""

    def valid(self, x: Tensor, signals: Signals) -> Tensor:
        return torch.ones(x.shape[0], dtype=torch.bool)


class LowPrecision(Naive):
    """Logits in the model's dtype."""

    def logits(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.score.weight.to(x.dtype)).float()


class LooksAhead(Naive):
    """Choices balanced over the batch: a later token moves earlier ones."""

    def decide(self, probs: Tensor, valid: Tensor) -> Tensor:
        return super().decide(probs - 2 * probs[valid].mean(0), valid)
