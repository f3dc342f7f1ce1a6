"""Routed layers become dense: the mean of the experts, or the most loaded one. Each returns (new model, Receipt)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...moe.averaged import AveragedExperts
from ...moe.layer import MoELayer
from ..change.conduct import Claim, Made, Seen, conduct, experts_of, weight_of
from ..change.graft import Graft, graft
from ..change.mlp import DenseMLP
from ..change.samples import Samples
from ..config import Average, Densify, MostLoaded
from ..receipt import Receipt
from .parts import mean
from .resize import observe, routed_paths
from .scores import loads

__all__ = ["average", "densify", "mean_expert", "most_loaded", "with_shared"]

EQUALS = "all experts of each layer are equal, and any of them is the layer"
SHOWN = "the mean of the experts is what each layer shows in evaluation"
EQUAL = 1e-6  # spread of total weights below which they count as constant


def densify(
    options: Densify,
    model: nn.Module,
    choose: Callable[[MoELayer, Sequence[Seen]], DenseMLP],
    shows: Callable[[MoELayer], bool] = lambda layer: False,
    **given: Any,
) -> tuple[nn.Module, Receipt]:
    """Every routed layer becomes `choose(layer, seen)`, scaled by the mean total weight, beside its shared expert.

    shows: whether that is what a layer computes in evaluation, although its experts differ.
    """
    paths = routed_paths(model, options.layers)

    def make(samples: Samples) -> Made:
        grafts: dict[str, Graft] = {}
        notes: list[str] = []
        exact = True
        for path, seen in observe(model, paths, samples).items():
            layer: Any = model.get_submodule(path)
            with torch.no_grad():
                dense, note, same = with_shared(layer, choose(layer, seen), seen)
            grafts[path] = Graft(dense=dense)
            exact = exact and same and (shows(layer) or _all_equal(layer))
            notes += [f"{path}: {note}"] if note else []
        claim = Claim(SHOWN if any(shows(model.get_submodule(p)) for p in paths) else EQUALS) if exact else None  # type: ignore[arg-type]
        return Made(model=graft(model, grafts), paths=paths, claim=claim, notes=notes)

    return conduct(options, model, make, **given)


def with_shared(layer: MoELayer, mlp: DenseMLP, seen: Sequence[Seen]) -> tuple[DenseMLP, str, bool]:
    """(the expert with its weight, beside the shared one; a note; whether weights are the same for all units)."""
    E = layer.config.num_experts
    total = torch.cat([torch.stack([weight_of(s.plan, e) for e in range(E)]).sum(0) for s in seen]).double()
    scale = float(total.mean())
    constant = float(total.max() - total.min()) < EQUAL
    note = "" if constant else f"weights of a token sum to {float(total.min()):.3g} to {float(total.max()):.3g}; "
    note += "" if constant else f"the mean, {scale:.3g}, was folded in"
    kind = type(layer.config.merge).__name__
    shared_scale = 1.0
    if layer.shared is not None:
        if kind == "MeanMerge":
            scale, shared_scale = scale / 2, 0.5
        elif layer.shared_gate is not None:
            gate: Any = layer.shared_gate
            values = torch.cat([torch.sigmoid(gate(s.x).double()) for s in seen])
            shared_scale, constant = float(values.mean()), False
            note += f"; the shared expert's gate is its mean, {shared_scale:.3g}"
        elif kind != "SumMerge":
            raise UserError(f"{kind} joins routed and shared outputs in a way that no dense layer does")
    # factors that rounding made out of 1 are 1: nothing is to change that need not
    scale = round(scale) if abs(scale - round(scale)) < EQUAL and round(scale) else scale
    out = mlp if scale == 1 else mlp.scaled(scale)
    if layer.shared is None:
        return out, note.strip("; "), constant
    shared = experts_of(layer.shared)[0]
    return out.beside(shared if shared_scale == 1 else shared.scaled(shared_scale)), note.strip("; "), constant


def _all_equal(layer: MoELayer) -> bool:
    first, *others = [e.tensors() for e in experts_of(layer.experts)]
    return all(o[n].shape == t.shape and torch.equal(o[n], t) for o in others for n, t in first.items())


def mean_expert(layer: MoELayer) -> DenseMLP:
    """The mean of the experts. Raises `UserError` for experts of different widths."""
    experts = experts_of(layer.experts)
    average: dict[str, Tensor] = mean([e.tensors() for e in experts], [1.0] * len(experts))
    return experts[0].changed(**average)


def average(options: Average, model: nn.Module, **given: Any) -> tuple[nn.Module, Receipt]:
    """W = mean of the experts' W, for every tensor (brief 48, step 5): what `AveragedExperts` shows in evaluation."""

    def shows(layer: MoELayer) -> bool:
        return isinstance(layer, AveragedExperts)

    return densify(options, model, lambda layer, seen: mean_expert(layer), shows, **given)


def most_loaded(options: MostLoaded, model: nn.Module, **given: Any) -> tuple[nn.Module, Receipt]:
    """The expert that most units chose; of equals the first."""

    def choose(layer: MoELayer, seen: Sequence[Seen]) -> DenseMLP:
        return experts_of(layer.experts)[int(loads(seen, layer.config.num_experts).argmax())]

    return densify(options, model, choose, **given)
