"""Adapters in runs: what their routers did in the objective's trail, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapt.attach import adapters
from ..adapt.mixture import files
from ..adapt.mixture.balance import watch
from ..adapt.mixture.linear import MixtureDelta
from ..adapt.peft import write
from ..convert.families import FAMILIES
from ..convert.loading import open_folder
from ..core.errors import UserError
from ..core.signals import Signals
from .layout import is_run
from .weights import tensors_of

__all__ = ["Seen", "added", "export", "family", "seen"]


class Seen:
    """An objective whose trail also holds what routers of adapters did, and their balance losses, pooled by layer."""

    def __init__(self, objective: Any) -> None:
        self.objective = objective

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def __call__(self, model: nn.Module, batch: Any, signals: Signals) -> Any:
        with watch(model) as routing:
            outcome = self.objective(model, batch, signals)
        return outcome._replace(trail=outcome.trail | routing.pooled())


def seen(objective: Any, model: nn.Module) -> Any:
    """The objective, which looks at the model's mixtures of adapters where it has some."""
    return Seen(objective) if any(isinstance(m, MixtureDelta) for m in model.modules()) else objective


def added(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of all that adapters have added to a model, states of their routers too."""
    every = tensors_of(model)
    base = {f"{path}.{name}" for path, m in adapters(model).items() for name in _base(m)}
    below = tuple(f"{path}." for path in adapters(model))
    return {name: tensor for name, tensor in every.items() if name.startswith(below) and name not in base}


def _base(module: nn.Module) -> tuple[str, ...]:
    """Names of the adapted module's own tensors."""
    return tuple(getattr(module, "_frozen", None) or module._parameters)


def export(model: nn.Module, folder: str | Path, *, to: str = "", base: str = "") -> Path:
    """Write a model's adapters alone: mixtures as MoLA publishes them, LoRA as PEFT does.

    to: family of the model in transformers, needed for LoRA. base: name or folder of the base model, for PEFT's config.
    Raises `UserError` for a model without adapters, and for what the format does not hold.
    """
    if any(isinstance(m, MixtureDelta) for m in model.modules()):
        files.save(model, folder)
        return Path(folder)
    if to not in FAMILIES:
        raise UserError(
            f"export: LoRA is written for a family of transformers; found {to!r}, known: {', '.join(FAMILIES)}"
        )
    return write.save(model, folder, to=to, base=base)


def family(start: str) -> str:
    """The family of the folder that a run began with; our own for runs."""
    return "moestro" if is_run(Path(start)) else open_folder(start).family.model_type
