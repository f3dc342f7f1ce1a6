"""What routers of adapters did in a forward pass: their plans, and the balance loss pooled over a layer's maps."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...core.signals import Signals
from ...core.stats import Stats
from ...core.trail import Trail
from ...losses.config import SwitchBalance
from ...ops.choice import in_backward
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


@torch.no_grad()
def diversity(model: nn.Module) -> dict[int, float]:
    """Layer -> mean Frobenius distance between the updates of two of its experts, over pairs and maps.

    Computed from the factors: <B_i A_i, B_j A_j> = sum of (B_i' B_j) * (A_i A_j'). Layers of one expert have 0.
    """
    found: dict[int, list[float]] = {}
    for delta in model.modules():
        if not isinstance(delta, MixtureDelta):
            continue
        a, b = delta.experts.a.double(), delta.experts.b.double() * delta.experts.scale
        E = a.shape[0]
        outs, ins = torch.einsum("ior,jos->ijrs", b, b), torch.einsum("ird,jsd->ijrs", a, a)
        inner = (outs * ins).sum((2, 3))
        norms = inner.diagonal()
        distance = (norms[:, None] + norms[None, :] - 2 * inner).clamp_min(0).sqrt()
        pairs = torch.triu_indices(E, E, 1, device=a.device)
        mean = float(distance[pairs[0], pairs[1]].mean()) if E > 1 else 0.0
        found.setdefault(delta.layer, []).append(mean)
    return {layer: sum(values) / len(values) for layer, values in sorted(found.items())}
