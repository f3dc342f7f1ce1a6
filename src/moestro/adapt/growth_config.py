"""Configs of growth in stages: how many blocks each adds, and what trains with them. No torch."""

from __future__ import annotations

from typing import Literal

from ..core.config import Config, config
from ..core.errors import UserError
from .config import LoRA

__all__ = ["GrowthSchedule", "Stage"]


@config
class Stage(Config):
    """One stage: new blocks on top of those that are there, which stand still together with the embedding.

    What trains are the new blocks, the last norm and the head. In the first stage everything trains.
    """

    blocks: int = 1
    """New blocks; 0 = none: the adapters or the head alone."""
    adapter: LoRA | None = None
    """Low-rank updates of the older blocks that train along and are added into them at the end of the stage."""
    trains: tuple[str, ...] = ()
    """Older parts that train whole all the same: embed, and blocks as "3" or "0:4" (without block 4)."""
    share: float = 1.0
    """Share of all updates, relative to that of the other stages."""

    def __post_init__(self) -> None:
        self.at_least(0, "blocks")
        self.positive("share")


@config
class GrowthSchedule(Config):
    """Stages in which a model grows from shallow to deep, layer by layer (Growing Transformers, brief 45, B).

    `adapt.growth.growing(schedule, model)` carries it out, `adapt.growth.stage_costs` counts it.
    """

    stages: tuple[Stage, ...] = (Stage(blocks=3), Stage(blocks=3), Stage(blocks=3))
    """The stages, in order; the first one makes the model. Default: the authors' controlled study."""
    start: Literal["identity", "random"] = "identity"
    """New blocks add nothing at first, so that the loss is what it was; or are drawn at random (post-norm blocks)."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("GrowthSchedule.stages is empty; give at least one stage")
        first = self.stages[0]
        if not first.blocks or first.adapter is not None or first.trains:
            raise UserError(
                "GrowthSchedule.stages: the first stage makes the model and trains all of it; give it blocks alone"
            )

    @classmethod
    def of(cls, *blocks: int, last: LoRA | None = None) -> GrowthSchedule:
        """Stages of so many blocks; last: low-rank updates of all blocks, with the head, as a stage after them."""
        stages = tuple(Stage(blocks=n) for n in blocks)
        return cls(stages=stages if last is None else (*stages, Stage(blocks=0, adapter=last)))

    def depths(self) -> list[int]:
        """Blocks of the model in every stage."""
        return [sum(stage.blocks for stage in self.stages[: i + 1]) for i in range(len(self.stages))]

    def updates(self, total: int) -> list[int]:
        """Optimiser steps of every stage, `total` in all. Raises `UserError` where a stage would have none."""
        whole = sum(stage.share for stage in self.stages)
        ends, done = [], 0.0
        for stage in self.stages:
            done += stage.share
            ends.append(round(total * done / whole))
        found = [end - start for start, end in zip([0, *ends], ends)]
        if min(found) < 1:
            raise UserError(f"GrowthSchedule: {total} updates are too few for {len(self.stages)} stages")
        return found
