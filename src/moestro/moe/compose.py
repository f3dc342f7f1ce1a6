"""The other two composers: blocks in series, and whole models. (The parallel one is the layer: dispatch and sum.)"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.carry import Carry
from ..core.errors import UserError
from ..core.plan import AnyPlan
from ..core.rows import Rows
from ..core.signals import Signals
from ..core.trail import Trail
from ..experts.touch import touch
from ..ops.combine import table_weight
from ..ops.rows import rows
from . import config as cfg
from .expected import expected_k
from .layer import route
from .record import build_losses, note
from .routed import Routed
from .units import check_fit, masked, pooled

__all__ = ["Serial", "Whole"]

Part = tuple[Tensor, Tensor | None, Tensor | float]  # output, its units (None = all), weight


class Serial(Routed):
    """Experts are blocks, run in order on the units that chose them; for the others a block is the identity.

    `(x, signals, carry) -> (y, carry, trail)`. Block e changes unit t by weight[t, e] * (block(h) - h), or by the
    whole difference with the weight's gradient on it (`residual="straight_through"`). A plan with all blocks at
    weight 1 is the plain stack.

    Shapes: x [T, *unit] (a unit is whatever a block takes: [S, D], [C, H, W]) or a dict or tuple of such tensors with
    one T, for blocks of several streams; y the same. router_input [T, D] is what the router reads, by default the
    mean of x over the inner axis. context: a tree of tensors [T, ...]; blocks take the running units' part of it as a
    second argument. Source: mixture of blocks (Dense2MoE), depth routing.
    Blocks return what they take, or (that, carry, trail); trails go on under `blocks.<e>`, carries are dropped.
    Virtual ids and units with owners are not supported (`UserError`).
    """

    def __init__(self, config: cfg.Serial, blocks: Iterable[nn.Module], dim: int) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(blocks)
        self.router = config.router.build(dim=dim, num_experts=len(self.blocks))
        self.losses = build_losses(config.losses, "Serial.losses")

    def forward(
        self,
        x: Any,
        signals: Signals | None = None,
        carry: Carry | None = None,
        router_input: Tensor | None = None,
        context: Any = None,
    ) -> tuple[Any, Carry, Trail]:
        signals = Signals() if signals is None else signals
        carry = Carry() if carry is None else carry
        x = _map(x, lambda t: masked(t, signals.valid))
        plan, carry = _plan(self, x, signals, carry, router_input, "Serial")
        trail = note(plan, self.losses, signals, self.training, "Serial")
        index, weight = _table(plan)
        for e, block in enumerate(self.blocks):
            x, left = self._run(block, x, _units_of(index, e), weight, index, e, context)
            trail = trail | left.under(f"blocks.{e}")
        return x, carry, trail

    def _run(
        self, block: nn.Module, x: Any, unit: Tensor, weight: Tensor, index: Rows, e: int, context: Any
    ) -> tuple[Any, Trail]:
        if unit.shape[0] == 0:
            return _touch_first(x, block.parameters()), Trail()
        w = _weight_of(index, weight, e)
        before = _map(x, lambda t: t.index_select(0, unit))
        after, left = _split(_call(block, before, _map(context, lambda t: t.index_select(0, unit))))
        if [t.shape for t in _leaves(after)] != [t.shape for t in _leaves(before)]:
            raise UserError("Serial: a block must return what it takes, in the same shapes, or (that, carry, trail)")
        if self.config.residual == "straight_through":
            w = 1 + (w - w.detach()) / w.detach().clamp_min(torch.finfo(w.dtype).tiny)
        changed = [h + (_broadcast(w, h) * (g - h)).to(h.dtype) for h, g in zip(_leaves(before), _leaves(after))]
        whole = [t.index_copy(0, unit, c) for t, c in zip(_leaves(x), changed, strict=True)]
        return _like(x, whole), left

    def expected_k(self) -> float:
        """How many blocks a unit runs on average."""
        return expected_k(self.router)


class Whole(Routed):
    """Experts are whole models; their outputs are averaged with the weights of a plan, or equally without a router.

    `(x, signals, carry, router_input, context) -> (y, carry, trail)`. In logits, y = sum of weight * z_m, whose softmax
    is the geometric mean of the models' distributions; in probabilities, y = log of sum of weight * softmax(z_m).

    Shapes: x [T, ...] is what the models take (token ids [B, S], say, with a sequence as the unit); each returns
    logits [T, ..., V], as a tensor, as `.logits` or first in a tuple (a trail in (y, carry, trail) goes on under
    `models.<e>`); y [T, ..., V] fp32 or wider. router_input [T, D] is needed where there is a router. Units that no
    model was asked for (padding) come out as zeros. A model runs only on the units that chose it; weights should add up
    to 1. Source: Growing Transformers (mean of logits).
    """

    def __init__(self, config: cfg.Whole, models: Iterable[nn.Module], dim: int = 0) -> None:
        super().__init__()
        self.config = config
        self.models = nn.ModuleList(models)
        if not len(self.models):
            raise UserError("Whole: give at least one model")
        self.router = None
        if config.router is not None:
            self.router = config.router.build(dim=dim, num_experts=len(self.models))
        elif config.losses:
            raise UserError("Whole.losses: without a router there is no plan to compute a loss from; leave them out")
        self.losses = build_losses(config.losses, "Whole.losses")

    def forward(
        self,
        x: Any,
        signals: Signals | None = None,
        carry: Carry | None = None,
        router_input: Tensor | None = None,
        context: Any = None,
    ) -> tuple[Tensor, Carry, Trail]:
        signals = Signals() if signals is None else signals
        carry = Carry() if carry is None else carry
        parts: list[Part] = []
        trail = Trail()
        if self.router is None:
            for e, model in enumerate(self.models):
                out, left = _output(_call(model, x, context))
                parts.append((out, None, 1 / len(self.models)))
                trail = trail | left.under(f"models.{e}")
            return self._average(parts, _leaves(x)[0].shape[0]), carry, trail
        if router_input is None:
            raise UserError("Whole: the router needs router_input [T, D], one vector per unit")
        plan, carry = _plan(self, x, signals, carry, router_input, "Whole")
        index, weight = _table(plan)
        trail = note(plan, self.losses, signals, self.training, "Whole")
        idle: list[Tensor] = []
        for e, model in enumerate(self.models):
            unit = _units_of(index, e)
            if unit.shape[0] == 0:
                idle += list(model.parameters())
                continue

            def take(t: Tensor, unit: Tensor = unit) -> Tensor:
                return t.index_select(0, unit)

            out, left = _output(_call(model, _map(x, take), _map(context, take)))
            parts.append((out, unit, _weight_of(index, weight, e)))
            trail = trail | left.under(f"models.{e}")
        if not parts:
            raise UserError("Whole: no unit chose any model; there is nothing to average")
        return touch(self._average(parts, _leaves(x)[0].shape[0]), idle), carry, trail

    def _average(self, parts: list[Part], T: int) -> Tensor:
        """The weighted average of (output, its units or all, weight), in the order of the models."""
        first = parts[0][0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        logits = self.config.space == "logits"
        y = first.new_full((T, *first.shape[1:]), 0.0 if logits else float("-inf"), dtype=dtype)
        for out, unit, weight in parts:
            out = out.to(dtype)
            old = y if unit is None else y.index_select(0, unit)
            w = _broadcast(weight, out) if isinstance(weight, Tensor) else torch.as_tensor(weight, dtype=dtype)
            new = old + w * out if logits else torch.logaddexp(old, _log(w) + torch.log_softmax(out, dim=-1))
            y = new if unit is None else y.index_copy(0, unit, new)
        return y if logits else torch.where(torch.isneginf(y.detach()).all(-1, keepdim=True), 0.0, y)

    def expected_k(self) -> float:
        """How many models a unit asks on average."""
        return float(len(self.models)) if self.router is None else expected_k(self.router)


def _plan(
    part: Any, x: Any, signals: Signals, carry: Carry, router_input: Tensor | None, what: str
) -> tuple[AnyPlan, Carry]:
    leaves = _leaves(x)
    if len({t.shape[0] for t in leaves}) != 1:
        raise UserError(f"{what}: the tensors of x must have one T, found {[list(t.shape) for t in leaves]}")
    seen = pooled(leaves[0], what) if router_input is None else masked(router_input, signals.valid)
    plan, carry = route(part.router, seen, signals, carry)
    if plan.owner is not None or getattr(plan, "virtual", ()):
        raise UserError(f"{what}: the router must choose real experts for the units of x themselves")
    check_fit(plan, leaves[0].shape[0], part.router.num_experts, what)
    return plan, carry


def _table(plan: AnyPlan) -> tuple[Rows, Tensor]:
    index = rows(plan)
    return index, table_weight(plan, index)


def _bounds(index: Rows, e: int) -> tuple[int, int]:
    return int(index.offsets[e]), int(index.offsets[e + 1])


def _units_of(index: Rows, e: int) -> Tensor:
    start, stop = _bounds(index, e)
    return index.unit[start:stop]


def _weight_of(index: Rows, weight: Tensor, e: int) -> Tensor:
    """[r] weights of the rows of expert e. Their places in the table are distinct, so the gradient adds nothing up."""
    start, stop = _bounds(index, e)
    place = index.unit[start:stop] * weight.shape[1] + index.slot[start:stop]
    return weight.reshape(-1).gather(0, place)


def _log(weight: Tensor) -> Tensor:
    return weight.clamp_min(torch.finfo(weight.dtype).tiny).log()


def _broadcast(w: Tensor, like: Tensor) -> Tensor:
    return w.view(-1, *[1] * (like.ndim - 1))


def _call(module: nn.Module, x: Any, context: Any) -> Any:
    return module(x) if context is None else module(x, context)


def _split(result: Any) -> tuple[Any, Trail]:
    """What a part returned, and the trail if it returned (y, carry, trail)."""
    if isinstance(result, tuple) and len(result) == 3 and isinstance(result[2], Trail):
        return result[0], result[2]
    return result, Trail()


def _output(result: Any) -> tuple[Tensor, Trail]:
    """The logits in what a model returned, and its trail."""
    found, trail = _split(result)
    if not isinstance(found, Tensor):
        found = found[0] if isinstance(found, tuple) and found else getattr(found, "logits", None)
    if not isinstance(found, Tensor):
        raise UserError(f"Whole: a model returned {type(result).__name__}; expected logits, .logits or (logits, ...)")
    return found, trail


def _map(tree: Any, function: Any) -> Any:
    return tree_map_only(Tensor, function, tree)


def _leaves(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _like(tree: Any, leaves: list[Tensor]) -> Any:
    rest = iter(leaves)
    return _map(tree, lambda _: next(rest))


def _touch_first(x: Any, parameters: Iterable[Tensor]) -> Any:
    """x with its first tensor in the graph of the parameters, which receive zeros."""
    first, *others = _leaves(x)
    return _like(x, [touch(first, parameters), *others])
