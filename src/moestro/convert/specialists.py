"""Options of mixtures of several dense models: BTX and BAM."""

from __future__ import annotations

from typing import ClassVar

from ..core.config import config
from ..losses.config import Loss, SwitchBalance, ZLoss
from ..routers.config import Raw, Renormalised, Weigh
from .base import Conversion

__all__ = ["BranchAttendMix", "BranchTrainMix", "Specialists"]


@config
class Specialists(Conversion):
    """Base of mixtures of several dense models of one ancestor. `build([model, model, ...], text=None, ...)`.

    Expert j of a layer is the feed-forward layer of model j; what becomes no expert is the mean of the models.
    """

    several: ClassVar[bool] = True
    top_k: int = 1
    """Feed-forward experts per token, K."""
    extra: int = 0
    """Further feed-forward experts, copies of those of the first model (the common ancestor, as a rule)."""
    router_std: float = 0.02
    """Standard deviation of the routers' random rows."""
    weigh: Weigh | None = None
    """How chosen feed-forward experts are weighted; null = the raw probability for one, renormalised for more."""
    losses: tuple[Loss, ...] = (SwitchBalance(coefficient=1e-2), ZLoss(coefficient=1e-3))
    """Losses of the routers of feed-forward experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "top_k")
        self.at_least(0, "extra", "router_std")

    def weights(self, top_k: int, weigh: Weigh | None) -> Weigh:
        """`weigh`, or what stands for null."""
        return weigh if weigh is not None else Raw() if top_k == 1 else Renormalised()


@config
class BranchTrainMix(Specialists):
    """Feed-forward layers side by side as experts, all else averaged (BTX, arXiv 2403.07816).

    `top_k=1` with raw weights is the baseline of BAM (brief 05).
    """

    builds: ClassVar[str] = "moestro.convert.merge.specialists:mix"
    top_k: int = 2
    """Feed-forward experts per token, K."""


@config
class BranchAttendMix(Specialists):
    """Attention as well as feed-forward layers side by side as experts, all else averaged (BAM, brief 05)."""

    builds: ClassVar[str] = "moestro.convert.merge.specialists:mix"
    shared_kv: bool = False
    """Whether keys and values are common to all attention experts, the mean of the models': one cache in place of N."""
    attention_top_k: int | None = None
    """Attention experts that count for a token; null = all, softly."""
    attention_weigh: Weigh | None = None
    """How attention experts are weighted; null = the raw probability for one or all, renormalised for some."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_top_k is not None:
            self.at_least(1, "attention_top_k")
