"""What objectives share: what they return, the signals of a batch, and cross-entropies of logits with a target each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.pytree import changed
from ..core.signals import Signals
from ..core.trail import Trail

__all__ = ["Outcome", "Prediction", "nats", "readings", "told"]


class Outcome(NamedTuple):
    """What the passes over a batch give.

    loss: [] sum of nats over the counted targets, with gradient. count: [] int64, how many those are.
    trail: routing of all passes. metrics: further additive sums by name.
    """

    loss: Tensor
    count: Tensor
    trail: Trail
    metrics: dict[str, Tensor]


class Prediction(NamedTuple):
    """logits: [N, V]. target: [N] int64, -1 = not counted. weight: factor on its nats."""

    logits: Tensor
    target: Tensor
    weight: float = 1.0


def nats(predictions: Sequence[Prediction], smoothing: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """([] sum of weighted nats, metrics) in fp32 (float64 for it).

    smoothing: (1 - s) * nats + s * mean over answers of -log p (Szegedy et al. 2016, section 7). Metrics: nats without
    smoothing; correct, how many units had all their predictions right.
    """
    loss, plain, right = [], [], None
    for said, target, weight in predictions:
        wide = said.to(torch.float64 if said.dtype == torch.float64 else torch.float32)
        with torch.autocast(said.device.type, enabled=False):
            logs = F.log_softmax(wide, dim=-1)
            own = F.nll_loss(logs, target, ignore_index=-1, reduction="sum") * weight
            plain.append(own.detach())
            if smoothing:
                evenly = -torch.where(target >= 0, logs.mean(-1), 0.0).sum() * weight
                own = (1 - smoothing) * own + smoothing * evenly
        loss.append(own)
        with torch.no_grad():
            hit = (wide.argmax(-1) == target) & (target >= 0)
            right = hit if right is None else right & hit
    assert right is not None
    return torch.stack(loss).sum(), {"nats": torch.stack(plain).sum(), "correct": right.sum()}


def readings(sums: Mapping[str, float], count: float) -> dict[str, float]:
    """Summed metrics of an objective over `count` targets as means, `correct` as `accuracy`.

    Where there is a `consistency`, the others are those of two passes over the targets.
    """
    passes = 2 if "consistency" in sums else 1
    over = {name: count * (1 if name == "consistency" else passes) for name in sums}
    return {"accuracy" if name == "correct" else name: value / over[name] for name, value in sums.items()}


def told(
    signals: Signals, tokens: Tensor, unit_id: Tensor, valid: Tensor | None = None, domain: Tensor | None = None
) -> Signals:
    """The signals with a batch's tokens, their numbers and padding, and every token's domain as `task` and `label`.

    Shapes: tokens [B, S], unit_id [B*S], valid [B, S] bool or None, domain [B] int64 or None. Positions and segments
    are the model's own matter: a segment means packed rows to attention, and costs the kernel its causal path.
    """
    more: dict[str, Tensor] = {}
    if valid is not None:
        more["valid"] = valid.reshape(-1)
    if domain is not None:
        each = domain[:, None].expand(tokens.shape).reshape(-1)
        more |= {"task": each, "label": each}
    return changed(signals, token=tokens.reshape(-1), unit_id=unit_id, **more)
