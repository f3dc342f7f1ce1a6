"""Growth in stages: shallow models become deep ones, block by block, and what each stage costs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from ..convert.config import Grow
from ..core.errors import UserError
from ..models.config import Stack as StackConfig
from ..models.growth import StepCost, step_cost, still, thaw
from ..models.stack import Stack
from .attach import adapters, attach, merge, unload
from .growth_config import GrowthSchedule, Stage

__all__ = ["Grown", "growing", "mean_flops", "prepare", "shallow", "stage_costs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grown:
    """A model at the start of a stage. number: of the stage, from 0. frozen: names of parameters that stand still."""

    number: int
    stage: Stage
    model: Stack
    frozen: tuple[str, ...]


def growing(schedule: GrowthSchedule, config: StackConfig, model: Stack | None = None) -> Iterator[Grown]:
    """The model of every stage, ready to train; ask for the next one when it is trained.

    config: of the whole model; a stage has its first blocks. model: a trained one of the first stage's depth, with
    which it begins; None = a new one. At the end of a stage its adapters are added into the blocks and removed, in
    place, also after the last one. Parameters of older stages keep every bit, but for those adapters.
    Raises `UserError` where the schedule adds up to another number of blocks.

        for stage in growing(GrowthSchedule.of(2, 2, 2), config):
            train(stage.model)

    Source: Growing Transformers, brief 45, B.
    """
    blocks, old = _blocks(schedule, config), 0
    for number, stage in enumerate(schedule.stages):
        depth = old + stage.blocks
        if model is None:
            model = shallow(config, depth).build()
        elif number == 0:
            if model.config.num_layers != depth:
                raise UserError(f"growing: the first stage has {depth} blocks, the model {model.config.num_layers}")
        else:
            for block, group in itertools.groupby(blocks[old:depth]):
                options = Grow(
                    blocks=len(list(group)), block=block, start=schedule.start, freeze=False, seed=config.seed
                )
                model, _ = options.build(model)
        assert model is not None
        if number:
            prepare(model, stage, old)
        frozen = tuple(n for n, p in model.named_parameters() if not p.requires_grad)
        yield Grown(number=number, stage=stage, model=model, frozen=frozen)
        if adapters(model):
            merge(model, keep=False)
            unload(model)
        old = depth


def prepare(model: Stack, stage: Stage, old: int) -> None:
    """Let train what a stage trains: all but the embedding and the first `old` blocks; adapters are put on these."""
    still(model, ["embed", f":{old}"])
    if stage.adapter is not None:
        layers = stage.adapter.layers or tuple(range(old))
        if max(layers) >= old:
            raise UserError(f"Stage.adapter: block {max(layers)} is none of the {old} older ones; it trains whole")
        attach(model, stage.adapter.replace(layers=layers))
    parts = [f"{old}:"] if stage.blocks else []
    parts += [part for part in ("norm", "head") if hasattr(model, part)]
    thaw(model, [*parts, *stage.trains])


def shallow(config: StackConfig, depth: int) -> StackConfig:
    """The config with its first `depth` blocks."""
    blocks = config.resolved()[:depth]
    if config.blocks is None and config.layout is None and config.num_experts is None:
        return config.replace(num_layers=depth)
    plain = {"moe": None, "layout": None, "num_experts": None, "residual_scale": 1.0}  # what blocks say themselves
    return config.replace(num_layers=depth, blocks=blocks, **plain)


def stage_costs(schedule: GrowthSchedule, config: StackConfig, seq_len: int = 1) -> list[StepCost]:
    """What a training step costs in every stage, counted from the config alone."""
    _blocks(schedule, config)
    found, old = [], 0
    for number, (stage, depth) in enumerate(zip(schedule.stages, schedule.depths(), strict=True)):
        with torch.device("meta"):
            model: Stack = shallow(config, depth).build()
        if number:
            prepare(model, stage, old)
        found.append(step_cost(model, seq_len))
        old = depth
    return found


def mean_flops(schedule: GrowthSchedule, config: StackConfig, seq_len: int = 1) -> float:
    """Training FLOPs per token, on the mean of all stages by their share of the updates."""
    shares = [stage.share for stage in schedule.stages]
    costs = stage_costs(schedule, config, seq_len)
    return sum(share * c.flops for share, c in zip(shares, costs, strict=True)) / sum(shares)


def _blocks(schedule: GrowthSchedule, config: StackConfig) -> tuple:
    depth = schedule.depths()[-1]
    if depth != config.num_layers:
        raise UserError(
            f"GrowthSchedule: its stages add up to {depth} blocks, the model has {config.num_layers}; change one"
        )
    return config.resolved()
