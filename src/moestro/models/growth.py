"""Layer-wise growth: which parts of a stack stay as they are, and what a training step then costs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from torch import nn

from ..core.account import cost
from ..core.errors import UserError
from ..routers.score import FrozenScore
from .stack import Stack

__all__ = ["StepCost", "frozen_paths", "step_cost", "still", "thaw"]


def still(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Freeze parts of a model: no gradient, no optimiser state, no step of their routers' biases.

    parts: "embed" (with the positions and norm that belong to it), "norm" (the last one), "head", and blocks as a
    number, "3", or a range without its end, "0:4", ":4", "2:"; "experts" and "routers" of all routed layers; with a
    head on an encoder (`models.config.Headed`) also "encoder" as a whole, "top" and "features".

    Returns the names of the parameters that stand still.
    What was frozen before stays frozen. A head that is tied to the embedding goes with it. Raises `UserError` for other
    words, for blocks that the model does not have, and where nothing would be left to train. Source: brief 45, B.
    """
    _set(model, parts, moves=False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"freezing {', '.join(parts)} leaves nothing of this model to train")
    return [n for n, p in model.named_parameters() if not p.requires_grad]


def thaw(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Let frozen parts train again; words as for `still`. Returns the names of the parameters that train.

    With adapters on all blocks (`adapt.attach` freezes everything else), this frees the newest blocks and the head: the
    last stages of brief 45, B.
    """
    _set(model, parts, moves=True)
    return [n for n, p in model.named_parameters() if p.requires_grad]


def _set(model: nn.Module, parts: Sequence[str], *, moves: bool) -> None:
    for path in frozen_paths(model, parts):
        found = model.get_submodule(path)
        found.requires_grad_(moves)
        for module in found.modules():
            if hasattr(module, "still"):
                module.still = not moves  # type: ignore[assignment]
            if isinstance(module, FrozenScore):
                module.requires_grad_(False)  # whatever trains round it


def frozen_paths(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Paths of the modules that these words name, in the order of the model."""
    wanted: set[str] = set()
    for part in parts:
        wanted |= _paths(model, part)
    return [n for n, _ in model.named_modules() if n in wanted]


def _paths(model: nn.Module, part: str) -> set[str]:
    here = {n for n, _ in model.named_children()}
    inner = "encoder" if "layers" not in here else ""
    stack = model.get_submodule(inner)
    before = f"{inner}." if inner else ""
    whole = {"experts", "routers", "norm", "head", *(("encoder", "top", "features") if inner else ())}
    if part == "embed":
        own = {n for n, _ in stack.named_children()}
        return {before + n for n in ("embed", "positions", "embed_norm", "relative") if n in own}
    if part in whole:
        paths = _routed(model, part) or {before + part if part == "norm" else part}
        if not paths <= {n for n, _ in model.named_modules()}:
            raise UserError(f"frozen: this {type(model).__name__} has no {part}")
        return paths
    count = len(stack.layers)  # type: ignore[arg-type]
    found = re.fullmatch(r"(\d+)|(\d*):(\d*)", part)
    if found is None:
        words = ", ".join(["embed", *sorted(whole)])
        raise UserError(f'frozen: {part!r} is no part; name {words}, or blocks such as "3" and "0:4"')
    start = int(found[1] or found[2] or 0)
    stop = int(found[1]) + 1 if found[1] else int(found[3] or count)
    if not start < stop <= count:
        raise UserError(f"frozen: blocks {part} of a model with {count} (0 to {count - 1})")
    return {f"{before}layers.{i}" for i in range(start, stop)}


def _routed(model: nn.Module, part: str) -> set[str]:
    """Paths of the banks, or routers, of all routed layers."""
    name = {"experts": "experts", "routers": "router"}.get(part)
    layers = [n for n, m in model.named_modules() if hasattr(m, "router") and hasattr(m, "experts")] if name else []
    return {f"{n}.{name}" if n else str(name) for n in layers}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCost:
    """What training a stack takes, counted. params: all. trained: those that move. flops: of forward and backward, per
    token. gradient_bytes, optimizer_bytes: of the trained parameters, in their dtype and two fp32 moments.
    activation_share: blocks whose activations are kept for the backward pass, of all blocks.
    """

    params: int
    trained: int
    flops: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_share: float


def step_cost(model: Stack, seq_len: int = 1) -> StepCost:
    """The cost of a training step, as the model is frozen now.

    A part below all that trains costs a forward pass only, and keeps no activations; a frozen part above costs the
    gradient of its input as well; a part that trains, three forward passes, as `core.account` counts. Parts are the
    embedding, the blocks and the head, each frozen or not as a whole: one trained parameter makes it a trained part.
    """
    named = dict(model.named_children())
    parts: list[nn.Module] = [m for n, m in named.items() if n in ("embed", "positions", "embed_norm", "relative")]
    parts += [*model.layers, *(m for n, m in named.items() if n in ("norm", "head"))]
    moves = [any(p.requires_grad for p in m.parameters()) for m in parts]
    head = getattr(model, "head", None)
    if head is not None and head.weight.requires_grad:  # also a tied one, whose matrix is the embedding's
        moves[-1] = True
    whole = cost(model, seq_len)
    counted = [cost(m, seq_len) for m in parts]
    own = whole.flops - sum(c.flops for c in counted)  # a tied head's matrix, which belongs to the stack
    reached, flops = False, 0
    kept = 0
    for part, made, moving in zip(parts, counted, moves, strict=True):
        forward = made.flops + (own if part is head else 0)
        back = made.backward_extra if reached or moving else 0
        flops += forward * (1 + (2 if moving else 1 if reached else 0)) + back
        reached = reached or moving
        kept += int(reached and any(part is layer for layer in model.layers))
    trained = [p for p in model.parameters() if p.requires_grad]
    return StepCost(
        params=whole.params,
        trained=sum(p.numel() for p in trained),
        flops=flops + (model.extra_backward_flops(seq_len) if reached else 0),
        gradient_bytes=sum(p.numel() * p.element_size() for p in trained),
        optimizer_bytes=sum(8 * p.numel() for p in trained),
        activation_share=kept / len(model.layers),
    )
