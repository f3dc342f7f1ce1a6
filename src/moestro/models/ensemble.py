"""Several decoders as one: their logits or probabilities are averaged; evaluated, cached and sampled like a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.carry import Carry
from ..core.errors import UserError
from ..core.pytree import changed
from ..core.signals import Signals
from ..core.trail import Trail
from ..moe.compose import Whole
from ..moe.config import Whole as WholeConfig
from .decoder import Decoder
from .ensembles import Ensemble as EnsembleConfig

__all__ = ["Ensemble", "ensemble"]


class Ensemble(Whole):
    """`(tokens [B, S], signals, carry) -> (y [B, S, V] fp32, carry, trail)`, every decoder on every token.

    In logits, y = mean of z_m: softmax(y) is the normalised geometric mean of the distributions. In probabilities,
    y = log of the mean of softmax(z_m). `loss`, `new_cache` and `serve.generate` work as with one decoder; the cost is
    the sum of the members'. Carry and trail: paths are those of the modules, such as "models.1.layers.0.ffn".
    Where a router chooses among models, see `moe.compose.Whole`. Source: brief 45, A.
    """

    def __init__(self, config: EnsembleConfig, models: Sequence[Decoder] | None = None) -> None:
        made = [m.build() for m in config.models] if models is None else list(models)
        super().__init__(WholeConfig(space=config.space), made)
        self.config = config  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self, tokens: Tensor, signals: Signals | None = None, carry: Carry | None = None
    ) -> tuple[Tensor, Carry, Trail]:
        signals = Signals() if signals is None else signals
        carry = Carry() if carry is None else carry
        limit: int = self.config.context  # type: ignore[attr-defined]
        if tokens.ndim == 2 and tokens.shape[1] > limit:
            raise UserError(f"{tokens.shape[1]} tokens do not fit the shortest context of these models, {limit}")
        parts: list[tuple[Tensor, None, float]] = []
        trail = Trail()
        for i, model in enumerate(self.models):
            name = f"models.{i}"
            y, after, left = model(tokens, signals.at(name), carry.at(name))
            parts.append((y, None, 1 / len(self.models)))
            carry = changed(carry.back(name, after), state=carry.state, ahead=carry.ahead)
            trail = trail | left.under(name)
        return self._average(parts, tokens.shape[0]), carry, trail  # type: ignore[arg-type]

    def loss(
        self, tokens: Tensor, targets: Tensor, signals: Signals | None = None, carry: Carry | None = None
    ) -> tuple[Tensor, Tensor, Carry, Trail]:
        """(sum of nats [], number of targets [] int64, carry, trail).

        Shapes: tokens, targets [B, S]; targets of -1 and padding (`signals.valid`) do not count.
        """
        y, after, trail = self(tokens, signals, carry)
        counted = targets.reshape(-1)
        if signals is not None and signals.valid is not None:
            counted = torch.where(signals.valid.reshape(-1), counted, -1)
        total = F.cross_entropy(y.flatten(0, 1), counted, ignore_index=-1, reduction="sum")
        return total, (counted >= 0).sum(), after, trail

    def new_cache(self, capacity: int | None = None) -> Carry:
        """A carry with an empty state for every mixer of every member."""
        capacity = self.config.context if capacity is None else capacity  # type: ignore[attr-defined]
        carry = Carry()
        for i, model in enumerate(self.models):
            carry = carry.back(f"models.{i}", model.new_cache(capacity))  # type: ignore[operator]
        return carry


def ensemble(models: Sequence[Decoder], space: Literal["logits", "probabilities"] = "logits") -> Ensemble:
    """Trained decoders as one model; they are used as they are, not copied.

    Raises `UserError` for anything but decoders of one vocabulary.
    """
    for i, model in enumerate(models):
        if not isinstance(model, Decoder):
            raise UserError(f"ensemble: model {i} is a {type(model).__name__}, not a decoder")
    config = EnsembleConfig(models=tuple(m.config for m in models), space=space)
    return Ensemble(config, models).train(any(m.training for m in models))
