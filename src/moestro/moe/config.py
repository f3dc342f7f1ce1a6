"""Configs of routed layers and composers. Built with (dim)."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import Config, config
from ..core.errors import UserError
from ..dispatch.config import Exchange, Local
from ..experts.config import Experts, Gated
from ..losses.config import Loss, SwitchBalance
from ..nn.config import Attention, Mixer
from ..routers.config import All, AnyRouter, Constant, Partition, Raw, Router, Uniform


@config
class Merge(Config):
    """Base of merges: how the routed output and that of the shared expert become one."""


@config
class SumMerge(Merge):
    """routed + shared (DeepSeek-MoE)."""

    builds: ClassVar[str] = "moestro.moe.merge:SumMerge"


@config
class MeanMerge(Merge):
    """(routed + shared) / 2."""

    builds: ClassVar[str] = "moestro.moe.merge:MeanMerge"


@config
class GateMerge(Merge):
    """routed + sigmoid(g . x) * shared, with a learned vector g (Qwen2-MoE)."""

    builds: ClassVar[str] = "moestro.moe.merge:GateMerge"


@config
class ConcatMerge(Merge):
    """Both side by side, routed first: the output is as wide as the two together."""

    builds: ClassVar[str] = "moestro.moe.merge:ConcatMerge"


@config
class MoELayer(Config):
    """A routed layer: router, bank of experts, exchange, losses, and optionally shared experts that all units meet."""

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
    merge: Merge = SumMerge()
    """How shared and routed outputs become one."""
    router_dim: int | None = None
    """Width of what the router reads, where that is not x; null = that of x."""
    unit_axes: int = 1
    """How many axes of x make a unit: 1 = tokens [..., D]; 2 = sequences [..., S, D]; 3 = images [..., C, H, W]."""

    def __post_init__(self) -> None:
        self.at_least(1, "num_experts", "unit_axes")


@config
class AveragedExperts(MoELayer):
    """Experts that units are dealt to at random in training; their mean is evaluated (48, EWA). No router learns."""

    builds: ClassVar[str] = "moestro.moe.averaged:AveragedExperts"
    num_experts: int = 4
    """Number of experts, N."""
    router: AnyRouter = Router(score=Uniform(), select=Partition(), weigh=Constant())
    """Who deals; random uniform partition."""
    losses: tuple[Loss, ...] = ()
    """Losses on the plan; loads are equal already."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared is not None or isinstance(getattr(self.experts, "width", 1), tuple):
            raise UserError("AveragedExperts: takes experts of one width and no shared expert, or they have no mean")


@config
class AttentionExperts(Mixer):
    """Attentions side by side, mixed by a router (05, BAM): by default softly, every token from all of them."""

    builds: ClassVar[str] = "moestro.moe.attention:AttentionExperts"
    num_experts: int = 4
    """Number of attention experts, N."""
    attention: Attention = Attention()
    """One of them."""
    router: AnyRouter = Router(select=All(), weigh=Raw())
    """Who weighs them, at the token that asks."""
    shared_kv: bool = False
    """Whether keys and values are common to all: one cache in place of N."""
    losses: tuple[Loss, ...] = ()
    """Losses on the plan, each with its coefficient; a soft mixture needs none."""

    def __post_init__(self) -> None:
        self.at_least(1, "num_experts")


@config
class Serial(Config):
    """Blocks run in order, each on the units that chose it; the others pass by unchanged. Built with (blocks, dim)."""

    builds: ClassVar[str] = "moestro.moe.compose:Serial"
    router: AnyRouter = Router()
    """Who decides which blocks a unit runs."""
    residual: Literal["weighted", "straight_through"] = "weighted"
    """What a block adds: its change times its weight, or its whole change with the weight's gradient."""
    losses: tuple[Loss, ...] = ()
    """Losses on the plan, each with its coefficient."""


@config
class Whole(Config):
    """Whole models as experts, combined in their outputs. Built with (models, dim)."""

    builds: ClassVar[str] = "moestro.moe.compose:Whole"
    router: AnyRouter | None = None
    """Who decides which models a unit asks; null = all, equally."""
    space: Literal["logits", "probabilities"] = "logits"
    """What is averaged: logits (a geometric mean of distributions) or probabilities."""
    losses: tuple[Loss, ...] = ()
    """Losses on the plan, each with its coefficient."""
