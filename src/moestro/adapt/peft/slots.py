"""Where a part of our model lies in its transformers counterpart: by the rule tables of `convert`."""

from __future__ import annotations

import dataclasses

from torch import nn

from ...convert.checkpoint.apply import bind
from ...convert.checkpoint.rules import Link
from ...convert.families import find
from ...core.errors import UserError
from ..attach import factors, places

__all__ = ["Slot", "slots"]

_IN_MEMORY = {"block_sparse_moe": "mlp"}  # transformers 5 keeps Mixtral's old names on disk only
_PARAMETERS = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}


@dataclasses.dataclass(frozen=True)
class Slot:
    """One matrix, or one stack of them.

    path, part: in our model, as `attach_at` takes them. module: path in the counterpart. parameter: of routed experts,
    the name of the stacked parameter there ("gate_up_proj" holds gate and up); None for a linear layer.
    """

    path: str
    part: str
    module: str
    parameter: str | None = None

    @property
    def short(self) -> str:
        """The module's path below its layer; equal in all layers."""
        head, _, rest = self.module.partition("layers.")
        return rest.partition(".")[2] if rest else head


def slots(model: nn.Module, to: str) -> list[Slot]:
    """Every place of the model that can have adapters, with or without some. Raises `UserError` where the family `to`
    does not hold the model, or keeps its experts in a way that adapters of PEFT cannot be written for."""
    own = set(factors(model))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n not in own}
    shapes |= {n: tuple(b.shape) for n, b in _persistent(model).items()}
    links = bind(find(to, "PEFT").table, shapes).links
    out: list[Slot] = []
    for place in places(model):
        for part in place.parts:
            name, index = _tensor(place.path, place.group, part)
            if name not in links:
                continue
            theirs = _linear(links[name], index, to) if place.group != "experts" else _experts(links[name], to)
            parameter = _PARAMETERS[part] if place.group == "experts" else None
            out.append(Slot(place.path, part, theirs, parameter))
    return out


def _persistent(model: nn.Module) -> dict[str, nn.Parameter]:
    named = dict(model.named_buffers())
    return {n: t for n, t in model.state_dict().items() if n in named}


def _tensor(path: str, group: str, part: str) -> tuple[str, int]:
    """Our tensor that a part lies in, and the number of its link."""
    if group in ("experts", "shared", "ffn"):
        return (f"{path}.down", 0) if part == "down" else (f"{path}.gate_up", int(part == "up"))
    return f"{path}.weight", 0


def _linear(links: list[Link], index: int, to: str) -> str:
    if index >= len(links) or links[index].steps or links[index].theirs_box is not None:
        raise UserError(f"PEFT: {to} does not keep {links[0].ours} as linear layers of its own")
    return links[index].theirs.removesuffix(".weight")


def _experts(links: list[Link], to: str) -> str:
    before, found, _ = links[0].theirs.partition(".experts.0.")
    if not found:
        raise UserError(f"PEFT: adapters of {to}'s experts cannot be written; its experts lie in another layout")
    head, _, last = before.rpartition(".")
    return f"{head}.{_IN_MEMORY.get(last, last)}.experts"
