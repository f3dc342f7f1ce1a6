"""What routers of adapters did in a forward pass: their plans, and the balance loss pooled over a layer's maps."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...core.signals import Signals
from ...core.stats import Stats
from ...core.trail import Key, Record, Term, Trail
from ...losses.config import SwitchBalance
from ...ops.choice import in_backward
from ...trace.diversity import Diversity, diversity_of_products
from .linear import MixtureDelta

__all__ = ["Routing", "diversity", "watch"]

_LOSS = SwitchBalance(coefficient=0.0).build()


class Routing:
    """What `watch` has seen of the passes inside it, with gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.deltas = {path: m for path, m in model.named_modules() if isinstance(m, MixtureDelta)}
        if not self.deltas:
            raise UserError("watch: the model has no mixture of adapters; attach one first")
        self._stats: dict[int, Stats] = {}
        self._passes: dict[str, int] = {}
        self.trail = Trail()

    def note(self, path: str, trail: Trail) -> None:
        number = self._passes.get(path, 0)
        self._passes[path] = number + 1
        layer = self.deltas[path].layer
        for term in trail.terms().values():
            self._stats[layer] = self._stats[layer] + term.stats if layer in self._stats else term.stats
        self.trail = self.trail | trail.detach().under(path).as_pass(number)

    def losses(self) -> dict[int, Tensor]:
        """Layer -> L_j = E_j sum_e f_e P_e, with f (share of choices) and P (mean probability) over all of the layer's
        maps and passes; at least 1 for uniform probabilities. Source: MoLA's released code."""
        return {layer: _LOSS.value(stats) for layer, stats in sorted(self._stats.items())}

    def loads(self) -> dict[int, Tensor]:
        """Layer -> [E] int64: how many choices each expert was given, over all of the layer's maps and passes."""
        found: dict[int, Tensor] = {}
        for key, record in self.trail.items():
            if record.load is not None:
                layer = self.deltas[key.path].layer
                found[layer] = found[layer] + record.load if layer in found else record.load
        return dict(sorted(found.items()))

    def pooled(self) -> Trail:
        """What was seen as part of a model's trail, with gradient: counts and plan of every router under its path, and
        under `MixtureDelta.pool` the balance loss of every layer, with its coefficient."""
        coefficient = {d.layer: d.config.balance for d in self.deltas.values()}
        records = {key: dataclasses.replace(record, terms={}) for key, record in self.trail.items()}
        pools = {d.layer: d.pool for d in self.deltas.values()}
        for layer, stats in self._stats.items():
            term = Term(stats=stats, loss=SwitchBalance(coefficient=coefficient[layer]).build())
            records[Key(pools[layer])] = Record(terms={_LOSS.name: term})
        return Trail(records)

    def loss(self) -> Tensor:
        """coefficient * sum over layers, [] fp32; to be added to the main loss. Each layer's own coefficient counts."""
        if not self._passes:
            raise UserError("routing.loss: no forward pass was run inside `with watch(model)`")
        weight = {d.layer: d.config.balance for d in self.deltas.values()}
        terms = [weight[layer] * value for layer, value in self.losses().items()]
        return torch.stack(terms).sum() if terms else torch.zeros(())


@contextlib.contextmanager
def watch(model: nn.Module, valid: Tensor | None = None) -> Iterator[Routing]:
    """`with watch(model) as routing:` sees every plan that the model's adapters make, and pools their balance losses.

    valid: bool of any shape with one entry per token, False = padding; for models that do not pass signals on (an
    attention mask of transformers, as bool). Padding is then routed nowhere and counted nowhere.
    Recomputation in a backward pass is not counted again.
    """
    routing = Routing(model)

    def saw(path: str) -> Any:
        def hook(module: nn.Module, args: Any, trail: Trail) -> None:
            if not in_backward():
                routing.note(path, trail)

        return hook

    def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        signals = kwargs.get("signals") or Signals()
        if signals.valid is None and valid is not None:
            signals = dataclasses.replace(signals, valid=valid.reshape(-1))
        return args, {**kwargs, "signals": signals}

    handles: list[Any] = []
    before = {path: delta.watched for path, delta in routing.deltas.items()}
    try:
        for path, delta in routing.deltas.items():
            handles.append(delta.port.register_forward_hook(saw(path)))
            if valid is not None:
                handles.append(delta.register_forward_pre_hook(tell, with_kwargs=True))
            delta.watched = True
        yield routing
    finally:
        for handle in handles:
            handle.remove()
        for path, delta in routing.deltas.items():
            delta.watched = before[path]


def diversity(model: nn.Module) -> dict[int, Diversity]:
    """Layer -> how unlike the updates B_e A_e of its experts are: means over pairs, then over the layer's maps."""
    found: dict[int, list[Diversity]] = {}
    for delta in model.modules():
        if isinstance(delta, MixtureDelta):
            one = diversity_of_products(delta.experts.b.detach() * delta.experts.scale, delta.experts.a.detach())
            found.setdefault(delta.layer, []).append(one)
    return {
        layer: Diversity(*(math.fsum(values) / len(values) for values in zip(*made)))
        for layer, made in sorted(found.items())
    }
