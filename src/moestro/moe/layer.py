"""The routed layer: a router writes a plan, rows go to experts and come back. The parallel composer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..core import account
from ..core.account import Cost
from ..core.carry import Carry, Forecast, Live, Replay
from ..core.errors import UserError
from ..core.plan import AnyPlan, Plan
from ..core.pytree import changed
from ..core.signals import Signals
from ..core.trail import Trail
from ..dispatch.base import mixture
from ..dispatch.local import Attribute
from . import config as cfg
from .asked import asked
from .expected import expected_k
from .record import build_losses, note
from .routed import Routed
from .units import all_to_one, check_fit, flatten, masked, pooled, to_tokens

__all__ = ["MoELayer", "route"]


class MoELayer(Routed):
    """`layer(x, signals, carry) -> (y, carry, trail)`: y = sum of weight * expert(x) over choices, and shared.

    Shapes: x [..., *unit], where the unit is [D] unless `unit_axes` says otherwise -> y of the same leading shape;
    router_input [..., D'] is read by the router in place of x. Signals are flat, [T] with T the number of units.

    Parameters are called `router.*`, `experts.*`, `shared.*` and `shared_gate.*`, whatever the exchange. Every
    parameter of every expert takes part in every backward pass. Padding (`signals.valid`) comes out as zeros and has
    no influence. causal: whether y of a token depends on tokens up to it only.

    A `Live` plan (made ahead, or addressed to this layer in `carry.own`) is used as it is; with a `Replay` the router
    recomputes the weights of the given choices; a `Forecast` only reaches `exchange.prepare`.
    experts: a ready bank in place of the one that the config describes.
    Raises `UserError` for a plan of another size, `MissingSignalError` for a signal that a router or loss lacks.
    """

    def __init__(self, config: cfg.MoELayer, dim: int, *, experts: nn.Module | None = None) -> None:
        super().__init__()
        E = config.num_experts
        self.config = config
        self.dim = dim
        self.router = config.router.build(dim=config.router_dim or dim, num_experts=E)
        self.experts: Any = config.experts.build(dim=dim, num_experts=E) if experts is None else experts
        if getattr(self.experts, "num_experts", E) != E:
            raise UserError(f"MoELayer: a bank of {self.experts.num_experts} experts where num_experts is {E}")
        self.experts.met = expected_k(self.router)
        self.exchange = config.exchange.build(Attribute(self, "experts"))
        self.losses = build_losses(config.losses, "MoELayer.losses")
        self.merge = config.merge.build()
        self.shared: Any = None
        self.shared_gate: nn.Linear | None = None
        if config.shared is not None:
            self.shared = config.shared.build(dim=dim, num_experts=1)
            self.shared.role = "shared_expert"
            if self.merge.gated:
                if getattr(config.shared, "deterministic", False):
                    raise UserError("MoELayer: a gated merge has no fixed order; leave out deterministic, or the gate")
                self.shared_gate = nn.Linear(dim, 1, bias=False)
                self.shared_gate.role = "shared_expert"  # type: ignore[assignment]

    def forward(
        self,
        x: Tensor,
        signals: Signals | None = None,
        carry: Carry | None = None,
        router_input: Tensor | None = None,
    ) -> tuple[Tensor, Carry, Trail]:
        signals = Signals() if signals is None else signals
        carry = Carry() if carry is None else carry
        units, lead = flatten(x, self.config.unit_axes, "MoELayer")
        if len(lead) == 2 and getattr(self.router, "mix", None) is not None:
            signals = changed(signals, rows=lead[0])
        units = masked(units, signals.valid)
        plan, carry = self.plan(units, signals, carry, router_input)
        y = self.run(units, plan, signals.valid, signals)
        trail = note(plan, self.losses, signals, self.training, "MoELayer")
        return y.reshape(*lead, *y.shape[1:]), carry, trail

    def plan(
        self, units: Tensor, signals: Signals, carry: Carry, router_input: Tensor | None = None
    ) -> tuple[AnyPlan, Carry]:
        """The plan for units [T, *unit], given or made by the router, without running an expert."""
        if router_input is None:
            seen = pooled(units, "MoELayer")
        else:
            seen = masked(flatten(router_input, 1, "MoELayer.router_input")[0], signals.valid)
        plan, carry = route(self.router, seen, signals, carry, self.exchange)
        check_fit(plan, units.shape[0], self.config.num_experts, "MoELayer")
        return plan, carry

    def run(self, units: Tensor, plan: AnyPlan, valid: Tensor | None = None, signals: Signals | None = None) -> Tensor:
        """y [T, *unit'] of units [T, *unit] under a plan. Banks with `takes_signals` get signals as context."""
        if plan.owner is not None:
            plan = to_tokens(plan, valid)
        self.exchange.prepare(plan)
        y = mixture(self.exchange, units, plan, _told(self.experts, signals, "experts"))
        y = _add_copies(y, units, plan)
        if self.shared is not None:
            index = all_to_one(units.shape[0], units.device)
            alone = self.shared(units, index, _told(self.shared, signals, "shared"))
            y = masked(self.merge(y, alone, units, self.shared_gate), valid)
        return y

    def expected_k(self) -> float:
        """How many routed experts a unit meets on average: k without virtual ids, an expectation or a cap elsewhere."""
        return expected_k(self.router)

    def cost(self, seq_len: int = 1) -> Cost:
        """All parameters; the active ones (router and shared fully, k/E of the experts); forward FLOPs per unit."""
        return sum((account.cost(part, seq_len) for part in self.children()), Cost(0, 0, 0))


def route(router: Any, seen: Tensor, signals: Signals, carry: Carry, exchange: Any = None) -> tuple[AnyPlan, Carry]:
    """The plan for what the router sees, [T, D]: a given one, one that the knob `experts` asks for (see `asked`), a
    replayed one, or the router's own."""
    ahead, carry = carry.take()
    given = ahead if carry.mine is None else carry.mine
    if isinstance(given, Live):
        return given.plan, carry
    if (wanted := signals.knob("experts", None)) is not None:
        return asked(wanted, router.num_experts, seen, signals), carry
    if isinstance(given, Forecast) and exchange is not None:
        exchange.prepare(given)
    inner = carry.at("router")
    if isinstance(given, Replay):
        inner = inner.keep(given)
    plan, after = router(seen, signals.at("router"), inner)
    if isinstance(given, Replay):
        after = dataclasses.replace(after, own={k: v for k, v in after.own.items() if k})
    return plan, carry.back("router", after)


def _told(bank: Any, signals: Signals | None, name: str) -> Signals | None:
    return signals.at(name) if signals is not None and getattr(bank, "takes_signals", False) else None


def _add_copies(y: Tensor, units: Tensor, plan: AnyPlan) -> Tensor:
    """y plus weight * x for every choice of a virtual id that copies."""
    if not isinstance(plan, Plan) or "copy" not in plan.virtual:
        return y
    if y.shape != units.shape:
        raise UserError(
            f"copy experts return their unit of shape {list(units.shape[1:])}, but this bank's output has shape "
            f"{list(y.shape[1:])}; take 'copy' out of Router.virtual"
        )
    ids = [plan.num_experts + i for i, kind in enumerate(plan.virtual) if kind == "copy"]
    copies = torch.stack([plan.expert == i for i in ids]).any(0)
    weight = torch.where(copies, plan.weight, 0.0).sum(1)
    return (y + weight.view(-1, *[1] * (units.ndim - 1)) * units).to(y.dtype)
