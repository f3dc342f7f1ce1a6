"""Mixtures of LoRA experts on a frozen linear map, each map with a router of its own (MoLA)."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from ...core.carry import Carry
from ...core.errors import UserError
from ...core.signals import Signals
from ...dispatch.base import mixture
from ...losses.config import SwitchBalance
from ...moe.dropin import Port
from ...moe.expected import expected_k
from ...moe.record import note
from ...moe.units import check_fit, flatten, masked
from ...nn.feedforward import FeedForward
from ...ops.choice import in_backward
from ...routers.config import Raw, Renormalised, TopK
from ...routers.score import LinearScore
from ..config import Mixture
from ..draws import Place
from ..linear import AdaptedFeedForward, AdaptedLinear, Delta
from ..lora.factors import draw
from .experts import LoRAExperts

__all__ = ["MixtureDelta", "MoEFeedForward", "MoELinear", "mixture_of"]

_BALANCE = SwitchBalance(coefficient=0.0)  # its statistics are pooled by whoever watches; see balance.py


class MixtureDelta(Delta):
    """sum over chosen e of w_e * alpha / r * B_e A_e dropout(x), chosen and weighed by a router that reads x.

    Shapes: x [..., I] -> [..., O]. Plans are seen by `collect` and `balance.watch`. layer: number of the layer among
    the adapted ones, over whose maps the balance loss is pooled; pool: what trails call it. Padding (`signals.valid`)
    gets no update and counts nowhere. Source: MoLA, arXiv 2402.08562.
    """

    def __init__(
        self, config: Mixture, inputs: int, outputs: int, like: Tensor, path: str, layer: int, layers: int
    ) -> None:
        super().__init__()
        E, k, rank = config.allocation.of(layer, layers)
        choice, changes = config.choice, {}
        if isinstance(choice.select, TopK):
            changes["select"] = choice.select.replace(k=k)
        if E == 1 and isinstance(choice.weigh, Renormalised):
            changes["weigh"] = Raw()  # the weight of a single expert is 1 either way: ordinary LoRA
        choice = choice.replace(**changes)
        self.config, self.layer, self.path, self.pool = config, layer, path, f"adapters.{layer}"
        self.place = Place(config.seed, path)
        self.router: Any = choice.build(dim=inputs, num_experts=E).to(like.device)
        if isinstance(self.router.score, LinearScore):
            draw(self.router.score.weight, config.seed, f"{path}.router")
        scale = config.alpha / rank
        self.experts = LoRAExperts(
            inputs, outputs, E, rank, scale=scale, dropout=config.dropout, seed=config.seed, path=path, like=like
        )
        self.experts.met = expected_k(self.router)
        self.losses = (_BALANCE.build(),) if self.router.select.makes == "Plan" else ()
        self.pooled_coefficient = config.balance
        self.port = Port()
        self.watched = False
        if config.balance and not self.losses:
            raise UserError("Mixture.balance: a balance loss has a meaning where units choose experts; set it to 0")

    def forward(self, x: Tensor, signals: Signals | None = None) -> Tensor:
        if self.config.balance and self.training and not self.watched and not in_backward():
            raise UserError(
                f"{self.path}: Mixture.balance is {self.config.balance:g}, but nobody adds the loss: run the model "
                "inside `with adapt.mixture.balance.watch(model) as routing` and add routing.loss(), or set it to 0"
            )
        signals = Signals() if signals is None else signals
        units, lead = flatten(x, 1, "MoELinear")
        units = masked(units, signals.valid)
        own = dataclasses.replace(signals, seed=self.place.seed(signals, "router"))
        plan, _ = self.router(units, own, Carry())
        check_fit(plan, units.shape[0], self.experts.num_experts, "MoELinear")
        y = mixture(self.experts, units, plan, signals)
        self.port(note(plan, self.losses, signals, self.training, "MoELinear"))
        return y.reshape(*lead, y.shape[-1])

    def step(self, counts: Tensor) -> None:
        """Move the router's state, if it has one, by the demand of one optimiser step. counts: [E] int64, all ranks."""
        self.router.step(counts)


class MoELinear(AdaptedLinear):
    """y = W x + bias + the mixture's update, W frozen. Shapes: x [..., I] -> y [..., O]."""

    delta: MixtureDelta

    def __init__(self, base: nn.Linear, config: Mixture, path: str = "", layer: int = 0, layers: int = 1) -> None:
        delta = MixtureDelta(config, base.in_features, base.out_features, base.weight, path, layer, layers)
        super().__init__(base, delta)

    @property
    def router(self) -> Any:
        return self.delta.router

    @property
    def experts(self) -> LoRAExperts:
        return self.delta.experts


class MoEFeedForward(AdaptedFeedForward):
    """The dense gated MLP with a mixture on each of its parts."""


def mixture_of(module: Any, config: Mixture, path: str, parts: tuple[str, ...], layer: int, layers: int) -> nn.Module:
    """The module with mixtures on its parts."""
    if not isinstance(module, FeedForward):
        return MoELinear(module, config, path, layer, layers)
    F, D = module.config.width, module.gate_up.shape[1]
    sizes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    deltas: dict[str, Delta] = {
        p: MixtureDelta(config, *sizes[p], module.down, f"{path}.{p}", layer, layers) for p in parts
    }
    return MoEFeedForward(module, deltas)
