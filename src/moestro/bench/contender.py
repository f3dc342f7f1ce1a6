"""One model in the race: training steps as the trainer takes them, and its parts by themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..optim.clip import clip, grad_norm
from ..optim.hooks import RouterSteps
from ..tasks.batches import Batches
from ..train.config import TrainRun
from ..train.ranks import Ranks
from ..train.step import Gradients
from ..train.stop import Stop

__all__ = ["Contender"]


@dataclasses.dataclass(frozen=True)
class Call:
    """What a module was called with in a real step, and a gradient for what it returned."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: Tensor

    def again(self) -> None:
        """Forward and backward of this module alone, into its input and its parameters."""
        x, *rest = self.args
        out = self.module(x.detach().requires_grad_(), *rest, **self.kwargs)
        torch.autograd.backward(_output(out), self.grad)


class Contender:
    """A decoder with its optimiser, taking the same steps on the same batches as all others."""

    def __init__(self, run: TrainRun, model: nn.Module, batches: Batches, ranks: Ranks) -> None:
        self.run, self.model, self.ranks = run, model, ranks
        self.optimizer = run.optimizer.build(model)
        self.gradients = Gradients(model, run.objective.build(), batches, run, ranks)
        self.after = RouterSteps(model)
        self.number, self.stop = 0, Stop()
        self.calls: dict[str, list[Call]] = {}

    def steps(self, n: int) -> None:
        """Take n optimiser steps."""
        for _ in range(n):
            found = self.gradients(self.number, self.stop)
            grads = [p.grad for p in self.gradients.parameters if p.grad is not None]
            clip(grads, float(grad_norm(grads)), self.run.optimizer.clip)
            self.optimizer.step(self.run.optimizer.schedule.factor(self.number, self.run.steps))
            self.optimizer.clear()
            self.after(self.number, found.counts)
            self.number += 1
        self.wait()

    def first(self) -> dict[str, Tensor]:
        """Gradients of the next step by parameter name, and its nats; no parameter moves. For the output check."""
        found = self.gradients(self.number, self.stop)
        out = {n: p.grad.detach().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.clear()
        return out | {"nats": torch.tensor(found.nats, dtype=torch.float64)}

    def listen(self) -> None:
        """Note what attention and feed-forward layers are called with in one step, so that `part` can repeat it."""
        calls: dict[str, list[Call]] = {"experts": [], "attention": []}
        handles: list[Any] = []

        def hook(kind: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
                y = _output(out)
                grad = torch.ones_like(y) / y.numel() ** 0.5
                args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
                calls[kind].append(Call(module, args, kwargs, grad))

            return note

        for block in self.model.layers:  # type: ignore[union-attr]
            handles.append(block.ffn.register_forward_hook(hook("experts"), with_kwargs=True))  # type: ignore[union-attr]
            handles.append(block.mixer.register_forward_hook(hook("attention"), with_kwargs=True))  # type: ignore[union-attr]
        try:
            self.first()
        finally:
            for handle in handles:
                handle.remove()
        self.calls = calls

    def part(self, kind: str) -> None:
        """Forward and backward of all layers of one kind, one after the other."""
        for call in self.calls[kind]:
            call.again()
        self.optimizer.clear()
        self.wait()

    def wait(self) -> None:
        """Until the accelerator has done what it was told."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)


def _output(out: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
