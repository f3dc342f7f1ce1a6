"""The base of options of conversions."""

from __future__ import annotations

from typing import ClassVar

from ..core.config import Config, config
from ..core.errors import UserError

__all__ = ["Conversion"]


@config
class Conversion(Config):
    """Base of conversions. `build(model, text=None, ...)` returns (new model, Receipt)."""

    layers: tuple[int, ...] | None = None
    """Which of the layers that could be converted, counted from 0 in the order of the model; null = all."""
    seed: int = 0
    """Seed of everything that is drawn."""

    needs_text: ClassVar[bool] = False
    several: ClassVar[bool] = False  # whether it takes a list of models

    def __post_init__(self) -> None:
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise UserError(f"{type(self).__name__}.layers: name different layers, at least one; found {self.layers}")
