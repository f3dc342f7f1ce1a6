"""A routed layer taken apart into what belongs to each expert, and put together with other experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import UserError
from ...experts.config import Gated, Modules
from ...experts.modules import ModuleBank
from ...moe.config import MoELayer as LayerConfig
from ...moe.layer import MoELayer
from ..change.graft import Graft

__all__ = ["Parts", "apart", "mean", "together"]

Named = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """experts: the bank's tensors of each expert. rows: the router's entries of each expert. virtual: those of each
    virtual id. rest: tensors that belong to no expert, by name in the layer. axes: router tensor -> its expert axis."""

    experts: Sequence[Named]
    rows: Sequence[Named]
    virtual: Sequence[Named]
    rest: Named
    axes: Mapping[str, int]


def apart(layer: MoELayer) -> Parts:
    """The layer's tensors (shared with it) by expert. Raises `UserError` for banks and routers that say not enough."""
    E = layer.config.num_experts
    axes = _router_axes(layer)
    state = {n: t.detach() for n, t in layer.state_dict().items()}
    rows: list[dict[str, Tensor]] = []
    ids = E + len(getattr(layer.config.router, "virtual", ()))
    for i in range(ids):
        rows.append({n: state[f"router.{n}"].select(axis, i) for n, axis in axes.items()})
    bank = {n.removeprefix("experts."): t for n, t in state.items() if n.startswith("experts.")}
    taken = {f"router.{n}" for n in axes}
    rest = {n: t for n, t in state.items() if not n.startswith("experts.") and n not in taken}
    return Parts(experts=_experts(layer.experts, bank), rows=rows[:E], virtual=rows[E:], rest=rest, axes=axes)


def _router_axes(layer: MoELayer) -> dict[str, int]:
    """Name of each router tensor that has an entry per expert -> the axis that counts them: the one that grows when the
    same router is built for twice as many."""
    config, E = layer.config, layer.config.num_experts
    if getattr(config.router, "subset", None) is not None:
        raise UserError("a router that addresses a subset of its experts cannot be given others")
    dim = config.router_dim or layer.dim
    with torch.device("meta"):
        wide = config.router.build(dim=dim, num_experts=2 * E).state_dict()
    axes: dict[str, int] = {}
    for name, tensor in layer.router.state_dict().items():
        grown = [a for a, (n, w) in enumerate(zip(tensor.shape, wide[name].shape)) if n != w]
        if len(grown) > 1:
            raise UserError(f"router.{name}: several axes count experts; such a router cannot be given others")
        if grown:
            axes[name] = grown[0]
    return axes


def _experts(bank: Any, tensors: Named) -> list[dict[str, Tensor]]:
    E = bank.num_experts
    if isinstance(bank, ModuleBank):
        found: list[dict[str, Tensor]] = [{} for _ in range(E)]
        for name, tensor in tensors.items():
            e, _, inner = name.partition(".")
            found[int(e)][inner] = tensor
        return found
    widths = getattr(bank, "widths", None)
    if widths is not None:
        gates, downs = tensors["gate_up"].split([2 * w for w in widths]), tensors["down"].split(list(widths))
        return [{"gate_up": g, "down": d} for g, d in zip(gates, downs, strict=True)]
    infos = bank.param_info() if hasattr(bank, "param_info") else {}
    unknown = [n for n in tensors if n not in infos or infos[n].expert_axis is None]
    if unknown:
        raise UserError(f"{type(bank).__name__}.{unknown[0]} does not say which axis counts experts (param_info)")
    return [{n: t.select(infos[n].expert_axis, e) for n, t in tensors.items()} for e in range(E)]


def together(
    layer: MoELayer, parts: Parts, experts: Sequence[Named], rows: Sequence[Named], ids: Sequence[int]
) -> Graft:
    """A layer like this one with these experts and router rows. ids: the old expert whose kind each new one is of."""
    config = _config(layer.config, ids)
    tensors = dict(parts.rest)
    for name, axis in parts.axes.items():
        tensors[f"router.{name}"] = torch.stack([r[name] for r in (*rows, *parts.virtual)], dim=axis)
    bank = layer.experts
    if isinstance(bank, ModuleBank):
        tensors |= {f"experts.{e}.{n}": t for e, own in enumerate(experts) for n, t in own.items()}
    elif getattr(bank, "widths", None) is not None:
        tensors |= {f"experts.{n}": torch.cat([e[n] for e in experts]) for n in experts[0]}
    else:
        infos = bank.param_info()
        for name in experts[0]:
            tensors[f"experts.{name}"] = torch.stack([e[name] for e in experts], dim=infos[name].expert_axis)
    return Graft(routed=config, dim=layer.dim, tensors=tensors)


def _config(config: LayerConfig, ids: Sequence[int]) -> LayerConfig:
    bank = config.experts
    if isinstance(bank, Gated) and isinstance(bank.width, tuple):
        bank = bank.replace(width=tuple(bank.width[i] for i in ids))
    elif isinstance(bank, Modules) and len(bank.experts) > 1:
        bank = bank.replace(experts=tuple(bank.experts[i] for i in ids))
    return config.replace(num_experts=len(ids), experts=bank)


def mean(parts: Sequence[Named], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of tensors of one shape. Raises `UserError` where their shapes differ."""
    total = sum(weights)
    shares = [w / total for w in weights] if total > 0 else [1 / len(parts)] * len(parts)
    out: dict[str, Tensor] = {}
    for name, first in parts[0].items():
        if any(p[name].shape != first.shape for p in parts):
            raise UserError(f"{name}: experts of different widths have no mean; prune or distil instead")
        if all(torch.equal(p[name], first) for p in parts):
            out[name] = first  # equal ones stay as they are, to the bit
            continue
        exact = torch.zeros_like(first, dtype=torch.float64)
        for part, share in zip(parts, shares, strict=True):
            exact += share * part[name].double()
        out[name] = exact.to(first.dtype)
    return out
