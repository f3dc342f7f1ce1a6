"""Balance losses in training: which ones the model declares, their sum, and the proof that each reached backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.stats import Stats
from ..core.trail import TermKey, Trail
from .ranks import Ranks

__all__ = ["Declared", "Reach", "declared", "pool", "total"]


class Declared(NamedTuple):
    """A loss with a coefficient, as the module tree has it."""

    path: str
    name: str


def declared(model: nn.Module) -> list[Declared]:
    """Every loss with a coefficient in any module's `losses`, except those that can move no router.

    A router without a trainable parameter (frozen, random, by label) cannot be moved by a loss: its terms are free not
    to have a gradient.
    """
    found: list[Declared] = []
    for path, module in model.named_modules(remove_duplicate=False):
        losses = getattr(module, "losses", ())
        if not isinstance(losses, tuple | list):
            continue
        router = getattr(module, "router", module)
        if isinstance(router, nn.Module) and any(p.requires_grad for p in router.parameters()):
            found += [Declared(path, loss.name) for loss in losses if getattr(loss, "coefficient", 0)]
            if getattr(module, "pooled_coefficient", 0):  # adapters: one term for all maps of a layer
                found += [Declared(module.pool, loss.name) for loss in losses]  # type: ignore[arg-type]
    return found


class Reach:
    """Watches whether every declared term's value received a gradient. A term that never does is an error.

    It watches until each term was reached once; `check` is called after the first backward pass of a process.
    """

    def __init__(self, model: nn.Module) -> None:
        self._missing = set(declared(model))

    def watch(self, key: TermKey, value: Tensor) -> None:
        name = Declared(key.path, key.name)
        if name in self._missing and value.requires_grad:
            value.register_hook(lambda grad: self._missing.discard(name))

    def check(self) -> None:
        if self._missing:
            said = ", ".join(f"{m.name} of {m.path or 'the model'}" for m in sorted(self._missing))
            raise UserError(
                f"losses with a coefficient never reached the backward pass: {said}. Their value has no gradient, or "
                "the trail of their layer was not returned by its parents; fix the layer, freeze its router, or set "
                "the coefficient to 0"
            )


def total(trail: Trail, reach: Reach | None = None) -> tuple[Tensor | float, dict[TermKey, Tensor]]:
    """(sum of coefficient * value with gradient, every term's detached value), each value computed once."""
    out: Tensor | float = 0.0
    values: dict[TermKey, Tensor] = {}
    for key, term in trail.terms().items():
        if not term.loss.coefficient:
            with torch.no_grad():
                values[key] = term.value()
            continue
        value = term.value()
        if reach is not None:
            reach.watch(key, value)
        out = out + term.loss.coefficient * value
        values[key] = value.detach()
    return out, values


def pool(ranks: Ranks, sums: Mapping[TermKey, Stats], more: list[Tensor]) -> tuple[dict[TermKey, Stats], list[Tensor]]:
    """Statistics and further tensors summed over ranks, in one message."""
    names = [(key, name) for key, stats in sums.items() for name in stats.sums]
    added = ranks.add([sums[key].sums[name].detach() for key, name in names] + more)
    out: dict[TermKey, dict[str, Tensor]] = {key: {} for key in sums}
    for (key, name), tensor in zip(names, added):
        out[key][name] = tensor
    return {key: Stats(values) for key, values in out.items()}, added[len(names) :]
