"""Models with weights in fewer bits, and what they take before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from ..core.errors import UserError, did_you_mean
from ..core.params import describe
from ..experts.bank import Bank
from ..experts.packed import PackedBank, packable
from ..nn.feedforward import FeedForward, PlainFeedForward
from ..nn.packed import PackedFeedForward, PackedLinear
from ..ops.packed import KINDS, Kind

__all__ = ["Packing", "bytes_by_kind", "pack_model"]

_LINEAR = ("attention", "head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """What was done to a model.

    before, after: bytes by role. packed: paths of the modules. kept: path -> why it stays as it is, of what might have
    been packed; routers, norms and embeddings (and a head that is tied to one) always stay.
    """

    kind: Kind
    before: dict[str, int]
    after: dict[str, int]
    packed: tuple[str, ...]
    kept: dict[str, str]


def bytes_by_kind(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers by role (`core.params.Role`), largest first; shared tensors count once."""
    roles = {name: info.role for name, info in describe(model).items()}
    found: dict[str, int] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, prefix: str, role: str) -> None:
        role = getattr(module, "role", role)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                kind = roles.get(prefix + name, role)
                found[kind] = found.get(kind, 0) + tensor.nbytes
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.", role)

    walk(model, "", "other")
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def pack_model(model: nn.Module, kind: Kind) -> Packing:
    """Pack, in place, the expert banks (shared ones too), dense FFNs, and the maps of attention and of an own head.

    One module is packed at a time, and its fp32 weights are let go, so little more than the model is ever held. The
    model can then neither be trained nor be loaded with fp32 weights. Raises `UserError` for an unknown kind and where
    there is nothing to pack; weights that a format cannot hold are an error that names the module.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind of weights {kind!r}{did_you_mean(kind, KINDS)}; known: {', '.join(KINDS)}")
    before, packed, kept = bytes_by_kind(model), [], {}

    def walk(parent: nn.Module, prefix: str, role: str) -> None:
        role = getattr(parent, "role", role)
        for name, child in list(parent.named_children()):
            path = prefix + name
            if isinstance(child, Bank):
                fits, why = packable(child)
                if fits:
                    _put(parent, name, path, lambda source: PackedBank(source, kind))
                    packed.append(path)
                else:
                    kept[path] = why
            elif type(child) is FeedForward:
                _put(parent, name, path, lambda source: PackedFeedForward(source, kind))
                packed.append(path)
            elif isinstance(child, PlainFeedForward):
                kept[path] = "dense MLPs of two plain maps have no packed form"
            elif isinstance(child, nn.Linear) and getattr(child, "role", role) in _LINEAR:
                _put(parent, name, path, lambda source: PackedLinear(source, kind))
                packed.append(path)
            else:
                walk(child, f"{path}.", role)

    walk(model, "", "other")
    if not packed:
        reasons = [f"{path}: {reason}" for path, reason in kept.items()]
        why = "; ".join(reasons) or "no experts, FFN, attention or head in it"
        raise UserError(f"there is nothing to pack in this model ({why}); use fp32 weights")
    return Packing(kind=kind, before=before, after=bytes_by_kind(model), packed=tuple(packed), kept=kept)


def _put(parent: nn.Module, name: str, path: str, make: Callable[[Any], nn.Module]) -> None:
    try:
        setattr(parent, name, make(getattr(parent, name)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
