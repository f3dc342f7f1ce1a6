"""Configs of routers: five replaceable steps (score, mix, select, weigh, limit) and the composite that runs them."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import Config, config
from ..core.errors import UserError

# Steps ------------------------------------------------------------------------------------------------------------


@config
class Score(Config):
    """Base of score steps: x [T, D] -> clean logits [T, E'] fp32. Built with (dim, num_ids)."""


@config
class Mix(Config):
    """Base of mix steps: (Scores, x, signals, carry) -> (Scores, carry). Built with (dim, num_ids)."""


@config
class Select(Config):
    """Base of select steps: (Scores, x, signals) -> choices. Built with (num_experts, num_ids)."""


@config
class Weigh(Config):
    """Base of weigh steps: (Scores, expert [T, K]) -> weight [T, K] fp32."""


@config
class Limit(Config):
    """Base of limit steps: (expert [T, K], Scores, signals) -> (expert, kept [T, K], capacity)."""


@config
class Linear(Score):
    """One linear map, as in Switch and Mixtral."""

    builds: ClassVar[str] = "moestro.routers.score:LinearScore"
    bias: bool = False
    """Whether the map has a bias."""


@config
class TopK(Select):
    """The k highest probabilities of each unit; equal ones go to the lower index."""

    builds: ClassVar[str] = "moestro.routers.select:TopKSelect"
    k: int = 2
    """Experts per unit."""


@config
class Renormalised(Weigh):
    """The probabilities of the chosen experts, divided by their sum (Mixtral, GShard)."""

    builds: ClassVar[str] = "moestro.routers.weigh:RenormalisedWeight"
    scale: float = 1.0
    """Factor on the result."""


# The composite ----------------------------------------------------------------------------------------------------


@config
class AnyRouter(Config):
    """Base of all routers. Built with (dim, num_experts)."""


@config
class Router(AnyRouter):
    """A router of five steps."""

    builds: ClassVar[str] = "moestro.routers.router:StepRouter"
    score: Score = Linear()
    """How x becomes logits."""
    activation: Literal["softmax", "sigmoid", "identity"] = "softmax"
    """How logits become the distribution that is selected from ("identity": similarities are used as they are)."""
    temperature: float = 1.0
    """Logits are divided by this before the activation. Call-time knob: temperature."""
    mix: Mix | None = None
    """How distributions of different units are combined before selection."""
    select: Select = TopK()
    """Which experts each unit takes."""
    weigh: Weigh = Renormalised()
    """With which weight."""
    limit: Limit | None = None
    """What happens when an expert is chosen too often; None = nothing is dropped."""
    virtual: tuple[Literal["null", "copy"], ...] = ()
    """Extra ids after the real experts: "null" adds nothing, "copy" adds weight * x."""
    subset: tuple[int, ...] | None = None
    """The experts of the bank that this router addresses; None = all. Plans speak of the bank's ids."""

    def __post_init__(self) -> None:
        for kind in self.virtual:
            if kind not in ("null", "copy"):
                raise UserError(f"Router.virtual: {kind!r} is neither 'null' nor 'copy'")
