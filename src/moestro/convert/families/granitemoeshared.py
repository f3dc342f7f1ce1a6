"""Granite MoE with an expert that all tokens meet (IBM 2025)."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...core.errors import UserError
from ...experts.config import Gated
from ...models.config import Decoder
from ...moe.config import MoELayer
from ..checkpoint.fields import Fields
from ..checkpoint.rules import Stack
from . import granitemoe
from .shared.parts import one

__all__ = ["FAMILY"]


def read(fields: Fields) -> Decoder:
    config = granitemoe.read(fields)
    width = fields.take("shared_intermediate_size", int, 0)
    if not width or config.moe is None:
        return config
    bank = config.moe.experts
    activation = bank.activation if isinstance(bank, Gated) else "silu"
    return config.replace(moe=config.moe.replace(shared=Gated(width=width, activation=activation)))


def write(config: Decoder) -> dict[str, Any]:
    fields = granitemoe.write(config)
    shared = one([b.ffn.shared for b in config.resolved() if isinstance(b.ffn, MoELayer)], "shared")
    if shared is None:
        return fields | {"shared_intermediate_size": 0}
    if type(shared) is not Gated:
        raise UserError(f"shared: {type(shared).__name__} has no place in this family; it needs Gated")
    return fields | {"shared_intermediate_size": shared.width}


def examples() -> dict[str, dict[str, Any]]:
    routed = granitemoe.examples()
    return {
        "shared": routed["multipliers"] | {"shared_intermediate_size": 28},
        "tied": routed["other"] | {"shared_intermediate_size": 12},
        "unshared": routed["plain"] | {"shared_intermediate_size": 0},
    }


_OURS, _THEIRS = "layers.{layer}.ffn.shared.", "model.layers.{layer}.shared_mlp."

FAMILY = dataclasses.replace(
    granitemoe.FAMILY,
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    table=(
        *granitemoe.TABLE,
        Stack(_OURS + "gate_up", _THEIRS + "input_linear.weight"),
        Stack(_OURS + "down", _THEIRS + "output_linear.weight"),
    ),
    read=read,
    write=write,
    examples=examples,
)
