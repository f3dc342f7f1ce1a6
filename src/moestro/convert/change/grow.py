"""Deeper models: new blocks on top of trained ones, which stand still from there on. Returns (new model, Receipt)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...models.config import Block, Decoder, PostNormBlock, PostNormCrossBlock
from ...models.config import Stack as StackConfig
from ...models.growth import still
from ...models.stack import Stack
from ...nn.init import OUTPUTS
from ..config import Grow
from ..receipt import LayerChange, Receipt
from .conduct import Claim, Made, conduct, experts_in
from .graft import fill
from .samples import Samples, forward

__all__ = ["grow", "grown"]


def grow(options: Grow, model: nn.Module, **given: Any) -> tuple[nn.Module, Receipt]:
    """The model with more blocks before its last norm and head, which it keeps.

    With start="identity" what the new blocks add to the residual stream starts at zero: the output is unchanged, which
    the receipt claims. With `freeze` embedding and old blocks are frozen in the new model (not in the old one): what
    trains are the new blocks, the last norm and the head. Raises `UserError` for anything but a decoder or an encoder,
    and for an unchanged start of post-norm blocks. Source: Growing Transformers, brief 45, B.
    """
    if not isinstance(model, Stack):
        raise UserError(f"Grow: takes a decoder or an encoder of Moestro, not a {type(model).__name__}")
    if options.layers is not None:
        raise UserError("Grow.layers: all old blocks stay as they are; leave it out")
    config = grown(model.config, options.blocks, options.block)
    block, old = config.resolved()[-1], model.config.num_layers
    same = options.start == "identity"
    if same and isinstance(block, PostNormBlock | PostNormCrossBlock):
        raise UserError('Grow.start: a post-norm block changes the output whatever it adds; use start="random"')
    paths = [f"layers.{i}" for i in range(old, config.num_layers)]

    def make(samples: Samples) -> Made:
        made: Stack = config.build()
        made.initialise(options.seed)
        like = model.embed.weight
        made.to(device=like.device, dtype=like.dtype)
        fresh = {n: t for n, t in made.state_dict().items() if any(n.startswith(f"{p}.") for p in paths)}
        zeros = [n for n in fresh if same and writes(n)]
        fill(made, model.state_dict() | fresh | {n: torch.zeros_like(fresh[n]) for n in zeros})
        _stand(model, made)
        notes = [f"{options.blocks} new blocks on top of {old}"]
        if options.freeze:
            names = still(made, ["embed", f":{old}"])
            notes.append(f"frozen: {len(names)} tensors of the embedding and of blocks 0 to {old - 1}")
            if isinstance(config, Decoder) and config.tied:
                notes.append("the head is the embedding's matrix and is frozen with it")
        moving = sum(p.numel() for p in made.parameters() if p.requires_grad)
        notes.append(f"parameters that train: {moving}")
        invented = {n: "zero: the new block adds nothing yet" if n in zeros else "initial value" for n in fresh}
        return Made(
            model=made.train(model.training),
            changes=lambda samples: _moved(made, paths, samples),
            claim=Claim("the new blocks add zeros, so the output is unchanged") if same else None,
            invented=invented,
            notes=notes,
        )

    return conduct(options, model, make, **given)


def grown(config: StackConfig, count: int, block: Block | None = None) -> StackConfig:
    """The config with so many more blocks at the end, like `block` or like the last one."""
    before = config.resolved()
    after = before + (before[-1] if block is None else block,) * count
    total = len(after)
    if config.blocks is None and config.layout is None:
        with contextlib.suppress(UserError):
            short = config.replace(num_layers=total)
            if short.resolved() == after:
                return short
    own: dict[str, Any] = {"cross": None, "source_dim": None} if isinstance(config, Decoder) else {}
    plain = {"moe": None, "layout": None, "num_experts": None, "residual_scale": 1.0}  # what blocks say themselves
    return config.replace(num_layers=total, blocks=after, **plain, **own)


def writes(name: str) -> bool:
    """Whether a tensor of a block belongs to a map whose output is added to the residual stream."""
    *_, before, last = ("", *name.split("."))
    own = before if last in ("weight", "bias") else last.removesuffix("_bias")
    return own in OUTPUTS


def _stand(old: nn.Module, new: nn.Module) -> None:
    """What was frozen in the old model is frozen in the new one."""
    frozen = {n for n, p in old.named_parameters() if not p.requires_grad}
    for name, parameter in new.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    modules = dict(new.named_modules())
    for name, module in old.named_modules():
        if getattr(module, "still", False):
            modules[name].still = True  # type: ignore[assignment]


@torch.no_grad()
def _moved(model: Stack, paths: Sequence[str], samples: Samples) -> list[LayerChange]:
    """How far every new block moves the stream: |block(h) - h| / |h|."""
    gap, size = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0.0)

    def record(path: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            h: Tensor = args[0].double()
            gap[path] += float((out[0].double() - h).square().sum())
            size[path] += float(h.square().sum())

        return hook

    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_hook(record(path)).remove)
        for batch in samples.batches:
            forward(model, batch)
    return [
        LayerChange(
            path=path,
            distance=math.sqrt(gap[path] / size[path]) if size[path] else math.sqrt(gap[path]),
            experts_before=0,
            experts_after=experts_in(getattr(model.get_submodule(path), "ffn", model)),
        )
        for path in paths
    ]
