"""MoE as a drop-in FFN for models whose forward is not ours, and a look at what its routers did."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError, did_you_mean
from ..core.signals import Signals
from ..core.trail import Key, Trail
from ..experts.config import Gated
from ..ops.choice import in_backward
from ..routers.config import Raw, Renormalised, Router, TopK
from . import config as cfg
from .carrier import ride
from .layer import MoELayer

__all__ = ["Collected", "MoE", "collect", "default_width", "step"]


UNSTEPPED = (
    "a loss-free router is being trained, but nobody counts its choices, so its bias never moves. Under transformers' "
    "Trainer, `import moestro.convert.hf` before the Trainer is made does it; in a loop of your own use "
    "`with moestro.convert.hf.router_steps(model) as routers: ...` and routers.step() after each optimizer.step(), or "
    "moestro.collect and moe.dropin.step"
)


def default_width(dim: int) -> int:
    """Hidden width of a gated expert that has the parameters of a plain FFN of width 4 * dim: 8/3 * dim, rounded up to
    a multiple of 8 (Shazeer 2020)."""
    return -(-dim // 3) * 8


class Port(nn.Module):
    """Passes a trail through. Forward hooks on it see the plans of a layer that returns y alone.

    moves: whether the layer has a router whose state must be stepped. Training it while nobody looks is warned about,
    once: its counts are lost, and the state never moves.
    """

    def __init__(self, moves: bool = False) -> None:
        super().__init__()
        self.moves = moves

    def forward(self, trail: Trail) -> Trail:
        if self.moves and self.training and torch.is_grad_enabled() and not self._forward_hooks:
            self.moves = False
            warnings.warn(UNSTEPPED, RuntimeWarning, stacklevel=2)
        return trail


class MoE(MoELayer):
    """A routed layer that is called like an FFN: `y = moe(x)`.

    Shapes: x [..., D], valid [...] bool without the last axis (False = padding) -> y [..., D].

    Losses with a coefficient (load balancing at 0.01 by default) ride on y's gradient: in training they act by
    themselves as soon as a loss that depends on y runs backward, and must not be added again. Each acts with the factor
    `loss_scale`, an attribute: set it to whatever the main loss is multiplied by (1 / micro-batches under
    accumulation, the gradient scaler's factor). In evaluation and under no_grad nothing rides.

    Weights are the probabilities of the chosen experts, divided by their sum where top_k > 1 (Mixtral; Switch).
    width: hidden width of each expert, `default_width(dim)` if not given. config: a whole layer config, in place of
    num_experts, top_k and width. experts: a ready bank. Draws of random routers are functions of `signals.seed`.
    With gradient checkpointing use `moestro.checkpoint`, or its context in a transformers model:
    `gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": moestro.checkpoint_context}`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int = 8,
        top_k: int = 2,
        width: int | None = None,
        *,
        config: cfg.MoELayer | None = None,
        experts: nn.Module | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        if config is None:
            config = cfg.MoELayer(
                num_experts=num_experts,
                router=Router(select=TopK(k=top_k), weigh=Raw() if top_k == 1 else Renormalised()),
                experts=Gated(width=default_width(dim) if width is None else width),
            )
        elif (num_experts, top_k, width) != (8, 2, None):
            raise UserError("MoE: give either config or num_experts, top_k and width; config holds all of them")
        super().__init__(config, dim, experts=experts)
        self.loss_scale = loss_scale
        self.port = Port(self.moves)

    def forward(  # type: ignore[override]
        self, x: Tensor, valid: Tensor | None = None, *, signals: Signals | None = None
    ) -> Tensor:
        if signals is None:
            signals = Signals()
        if valid is not None:
            signals = dataclasses.replace(signals, valid=valid.reshape(-1))
        y, _, trail = super().forward(x, signals)
        trail = self.port(trail)
        return ride(y, trail.loss(), self.loss_scale) if self.training else y


class Collected:
    """What `collect` has seen so far. Everything is detached: losses ride on y, they are not to be added again."""

    def __init__(self) -> None:
        self._trail = Trail()
        self._trained: set[Key] = set()

    @property
    def trail(self) -> Trail:
        """(module path, pass) -> Record; the n-th time that a layer ran is pass n, from 0."""
        return self._trail

    def counts(self) -> dict[str, Tensor]:
        """path -> [E] int64, demand summed over the passes in training mode."""
        return Trail({k: r for k, r in self._trail.records.items() if k in self._trained}).counts()

    def clear(self) -> None:
        """Forget what was seen; the next pass is number 0."""
        self._trail, self._trained = Trail(), set()

    def _write(self, path: str, trail: Trail, training: bool) -> None:
        passes = sum(k.path == path for k in self._trail)
        self._trail = self._trail | trail.detach().under(path).as_pass(passes)
        if training:
            self._trained.add(Key(path, passes))


@contextlib.contextmanager
def collect(model: nn.Module, keep: Iterable[str] = ()) -> Iterator[Collected]:
    """`with collect(model) as seen:` `seen.trail` holds plans, counts and losses of every drop-in layer and
    every mixture of adapters.

    keep: plan tensors to hold on to, of "probs", "logits", "extra" (they are [T, E] and dropped otherwise).
    Works by forward hooks that are gone after the block. Recomputation in a backward pass writes nothing. Raises
    `UserError` for a model without a drop-in layer.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(getattr(m, "port", None), Port)}
    if not layers:
        raise UserError(
            "collect: the model has no moestro.MoE layer and no mixture of adapters "
            "(layers of moestro's own models return their trail)"
        )
    seen, kept = Collected(), frozenset(keep)

    def watch(path: str, layer: Any) -> Iterator[Any]:
        def write(module: nn.Module, args: Any, trail: Trail) -> None:
            if not in_backward():
                seen._write(path, trail, layer.training)

        def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            signals = kwargs.get("signals") or Signals()
            return args, {**kwargs, "signals": dataclasses.replace(signals, keep=signals.keep | kept)}

        yield layer.port.register_forward_hook(write)
        if kept:
            yield layer.register_forward_pre_hook(ask, with_kwargs=True)

    handles: list[Any] = []
    try:
        for path, layer in layers.items():
            handles.extend(watch(path, layer))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def step(model: nn.Module, counts: Collected | Mapping[str, Tensor]) -> None:
    """Move the state of loss-free routers: once per optimiser step, with what `collect` counted or a mapping by path.

    counts: path -> [E] int64, summed over micro-batches and, on several ranks, over ranks.
    Raises `UserError` for a path without a routed layer.
    """
    table = counts.counts() if isinstance(counts, Collected) else counts
    layers = {path: m for path, m in model.named_modules() if isinstance(m, MoELayer)}
    for path, count in table.items():
        if path not in layers:
            raise UserError(f"step: the model has no routed layer at {path!r}{did_you_mean(path, layers)}")
        layers[path].step(count)
