"""Configs of the MoE layer. Built with (dim)."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import Config, config
from ..dispatch.config import Exchange, Local
from ..experts.config import Experts, Gated
from ..losses.config import Loss, SwitchBalance
from ..routers.config import AnyRouter, Router


@config
class MoELayer(Config):
    """A routed layer: router, bank of experts, exchange, losses, and optionally shared experts that every unit meets."""

    builds: ClassVar[str] = "moestro.moe.layer:MoELayer"
    num_experts: int = 8
    """Number of routed experts, E."""
    router: AnyRouter = Router()
    """Who decides."""
    experts: Experts = Gated()
    """What is decided between."""
    exchange: Exchange = Local()
    """How rows get there and back."""
    losses: tuple[Loss, ...] = (SwitchBalance(),)
    """Losses on the plan, each with its coefficient."""
    shared: Experts | None = None
    """An expert that every unit meets (a bank of one)."""
    merge: Literal["sum", "mean", "gate"] = "sum"
    """How shared and routed outputs are merged; "gate" = sigmoid gate on the shared one (Qwen2-MoE)."""
