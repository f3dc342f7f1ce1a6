"""Routers that learn without a gradient, under somebody else's training loop: counted per pass, moved once per step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...core.errors import UserError
from ...core.trail import Trail
from ...moe.dropin import Port
from ...moe.routed import Routed
from ...ops.choice import in_backward
from ...optim.hooks import RouterSteps

__all__ = ["RouterStepsCallback", "RouterWatch", "router_steps"]


class _Owner(NamedTuple):
    """A module whose trails pass a port: a drop-in layer, or a whole decoder."""

    path: str
    module: Any
    port: Port


class RouterWatch:
    """Counts how often each expert is chosen in training, and moves the routers that follow such counts.

    A pass counts when its layer is in training mode, gradients are recorded, and it is not a recomputation. Counts are
    int64 and apart from the model: no cast, save or evaluation reaches them. `counts`: path -> [E] since the last step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.counts: dict[str, Tensor] = {}
        self.owners = [
            _Owner(path.rpartition(".")[0], model.get_submodule(path.rpartition(".")[0]), port)
            for path, port in model.named_modules()
            if isinstance(port, Port)
        ]
        self.moving: dict[str, Any] = {
            path: m for path, m in model.named_modules() if isinstance(m, Routed) and m.moves
        }
        self._handles: list[Any] = []
        self._scales: list[float] = []
        for path in self.moving:
            if not any(path == o.path or path.startswith(o.path + "." if o.path else "") for o in self.owners):
                raise UserError(
                    f"{path}: the state of this router moves by its counts, which a layer that returns a trail gives "
                    "to nobody here; put moestro.MoE there, or train it with moestro's own loop"
                )

    @property
    def useful(self) -> bool:
        """Whether the model has layers of ours that return no trail to the loop."""
        return bool(self.owners)

    def open(self) -> None:
        """Begin to count, in place of any other watch: routers are never stepped by two."""
        for other in {id(w): w for o in self.owners if (w := getattr(o.port, "watch", None)) is not None}.values():
            other.close()
        for owner in self.owners:
            owner.port.watch = self  # type: ignore[assignment]
            self._handles.append(owner.port.register_forward_hook(self._counting(owner.path)))
            self._scales.append(owner.module.loss_scale)
        self.counts = {}

    def close(self) -> None:
        """Stop counting; what `scale` changed is put back."""
        for handle in self._handles:
            handle.remove()
        for owner, scale in zip(self.owners, self._scales):
            owner.port.watch = None  # type: ignore[assignment]
            owner.module.loss_scale = scale
        self._handles, self._scales, self.counts = [], [], {}

    def _counting(self, path: str) -> Any:
        def count(port: Port, args: Any, trail: Trail) -> None:
            if not port.training or not torch.is_grad_enabled() or in_backward():
                return
            for name, counts in (trail.under(path) if path else trail).counts().items():
                counts = counts.detach()
                self.counts[name] = self.counts[name] + counts if name in self.counts else counts

        return count

    def scale(self, factor: float) -> None:
        """What riding losses are multiplied by in the coming passes: what the main loss is multiplied by."""
        for owner in self.owners:
            owner.module.loss_scale = factor

    def step(self, number: int = 0) -> Mapping[str, Tensor]:
        """Move the routers by what was counted since the last step, over all ranks; returns those counts.

        Call it once after every step of the optimiser.
        """
        counts, self.counts = self.counts, {}
        counts = _over_ranks(counts, self.moving)
        RouterSteps(self.model)(number, {path: c for path, c in counts.items() if path in self.moving})
        return counts

    def drop(self) -> None:
        """Forget what was counted: the optimiser made no step (its gradients overflowed)."""
        self.counts = {}


def _over_ranks(counts: dict[str, Tensor], moving: Mapping[str, Any]) -> dict[str, Tensor]:
    """The counts of moving routers summed over ranks in one message; zeros where this rank's layer met nothing."""
    if not moving or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return counts
    device = next((c.device for c in counts.values()), next(next(iter(moving.values())).buffers()).device)
    parts = [
        counts[path] if path in counts else torch.zeros(layer.router.num_experts, dtype=torch.int64, device=device)
        for path, layer in moving.items()
    ]
    message = torch.cat([p.to(device) for p in parts])
    torch.distributed.all_reduce(message)
    return {**counts, **dict(zip(moving, message.split([len(p) for p in parts])))}


@contextlib.contextmanager
def router_steps(model: nn.Module) -> Iterator[RouterWatch]:
    """For a training loop of your own, over a transformers model with `moestro.MoE` layers or a `MoestroForCausalLM`.

        with moestro.convert.hf.router_steps(model) as routers:
            for batch in batches:
                ...  # forward and backward, in as many parts as you like
                optimizer.step()
                routers.step()

    Raises `UserError` for a model without layers of ours.
    """
    watch = RouterWatch(model)
    if not watch.useful:
        raise UserError("router_steps: the model has no moestro.MoE layer and is no MoestroForCausalLM")
    watch.open()
    try:
        yield watch
    finally:
        watch.close()


class RouterStepsCallback(TrainerCallback):
    """Steps routers once per optimiser step of a Trainer, and keeps the factor of riding losses right.

    `import moestro.convert.hf` gives it to every Trainer made afterwards; it does nothing for models without layers of
    ours. Riding losses (`moestro.MoE` in somebody else's model; a `MoestroForCausalLM` called without labels) act with
    1 / (batches accumulated in this step), times the factor of a gradient scaler: their mean over the step.
    """

    def __init__(self) -> None:
        self.watch: RouterWatch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._end()
        watch = RouterWatch(model)
        if watch.useful:
            watch.open()
            self.watch = watch

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.watch is not None:
            scaler = getattr(optimizer, "scaler", None)
            factor = 1.0 if scaler is None else float(scaler.get_scale())
            self.watch.scale(factor / _batches(args.gradient_accumulation_steps, state.global_step, train_dataloader))

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.watch is not None:
            if getattr(optimizer, "step_was_skipped", False):
                self.watch.drop()
            else:
                self.watch.step(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self.watch is not None:
            self.watch.close()
            self.watch = None


def _batches(accumulated: int, step: int, loader: Any) -> int:
    """How many batches make up this optimiser step: fewer at the end of an epoch that does not divide evenly."""
    try:
        length = len(loader)
    except TypeError:
        return accumulated
    steps = max(1, -(-length // accumulated))
    last = step % steps == steps - 1
    return (length % accumulated or accumulated) if last else accumulated
