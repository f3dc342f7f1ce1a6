"""A routed layer assembled from dense ones, its router rows, and the walk over all layers that methods share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...moe.config import MoELayer
from ...routers.config import Constant, Frozen, Label, Linear, Raw, Renormalised, Router, TopK, Uniform, Weigh
from ..change.conduct import Claim, Made, choose, conduct, generator, watch
from ..change.graft import Graft, graft
from ..change.mlp import DenseMLP, Place, bank_of, find
from ..change.samples import Samples
from ..config import Upcycle
from ..receipt import Receipt
from .neurons import kmeans

__all__ = ["Layer", "assemble", "balanced_weigh", "one_in_all", "router_rows", "upcycle"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What becomes of one dense layer. rows: [E, D] of the router. exact: whether its output is unchanged. frozen:
    whether the router never learns."""

    experts: Sequence[DenseMLP]
    rows: Tensor
    weigh: Weigh
    shared: DenseMLP | None = None
    exact: bool = False
    frozen: bool = False
    invented: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def score(self) -> str:
        """Path of the router's rows in the new layer."""
        return "router.score.inner.weight" if self.frozen else "router.score.weight"


Inputs = Callable[[str], Tensor]
Proof = Callable[[nn.Module, Sequence[str], Samples], str]


def upcycle(
    options: Upcycle,
    model: nn.Module,
    make: Callable[[Place, int, Inputs], Layer],
    claim: str,
    *,
    prepare: Callable[[Sequence[Place], Samples], None] | None = None,
    proof: Proof | None = None,
    text: Any = None,
    num_bytes: int | None = None,
    sources: Sequence[str] = (),
) -> tuple[nn.Module, Receipt]:
    """Dense layers into routed ones by `make(place, experts, inputs)`; inputs(path) is what the layer sees, [T, D].

    claim: what is unchanged if every layer says that it is exact. prepare: called once with all places.
    proof: looks at the new model's layers for what the claim says, beyond its output.
    """
    places = choose(find(model), options.layers, "dense feed-forward layer that is understood")
    counts = options.counts(len(places))

    def build(samples: Samples) -> Made:
        cache: dict[str, Tensor] = {}

        def inputs(path: str) -> Tensor:
            if not cache:
                seen = [watch(model, [p.path for p in places], b) for b in samples.batches]
                cache.update({p.path: torch.cat([s[p.path].x for s in seen]) for p in places})
            return cache[path]

        if prepare is not None:
            prepare(places, samples)
        grafts: dict[str, Graft] = {}
        invented: dict[str, str] = {}
        notes: list[str] = []
        layers = []
        for place, count in zip(places, counts, strict=True):
            with torch.no_grad():
                layer = make(place, count, inputs)
                grafts[place.path], why = assemble(options, layer)
            layers.append(layer)
            if options.router != "label":
                rows = "small random values" if options.router == "random" else "centroids of what the layer sees"
                invented[f"{place.path}.{layer.score}"] = rows
            if layer.invented is not None:
                names = [n for n in grafts[place.path].tensors if n.startswith("experts.")]
                invented |= {f"{place.path}.{n}": layer.invented for n in names}
            for name, tensor in grafts[place.path].tensors.items():
                if name.endswith("_bias") and not bool(tensor.any()):
                    invented.setdefault(f"{place.path}.{name}", "zeros: the bias lies elsewhere, or there was none")
            notes += [f"{place.path}: {n}" for n in (*place.notes, *layer.notes, *why)]
        exact = None
        if all(layer.exact for layer in layers):
            alone = options.top_k == 1 and all(w.weigh == Constant(value=1.0) for w in layers)
            bits = alone and all(layer.shared is None for layer in layers)
            seen = None if proof is None else partial(_prove, proof, [p.path for p in places])
            exact = Claim(claim, bitwise=bits, dense={p.path: p.mlp for p in places}, proof=seen)
        if options.router == "label":
            notes.append("compared with every token's expert named by its number, so that all experts were met")
        elif options.top_k == 1 and layers[0].weigh == Constant(value=1.0):
            notes.append("the weight of the chosen expert is always 1: routers learn from their losses only")
        paths = [p.path for p in places]
        return Made(model=graft(model, grafts), paths=paths, claim=exact, invented=invented, notes=notes)

    return conduct(options, model, build, text=text, num_bytes=num_bytes, sources=sources)


def _prove(proof: Proof, paths: Sequence[str], model: nn.Module, samples: Samples) -> str:
    return proof(model, paths, samples)


def assemble(options: Upcycle, layer: Layer) -> tuple[Graft, list[str]]:
    """(the routed layer, notes)."""
    bank, tensors, note = bank_of(layer.experts)
    named = {f"experts.{n}": t for n, t in tensors.items()}
    if options.router != "label":
        named[layer.score] = layer.rows.to(layer.experts[0].up)
    shared = None
    if layer.shared is not None:
        shared, own, _ = bank_of([layer.shared])
        named |= {f"shared.{n}": t for n, t in own.items()}
    score = Frozen(inner=Linear()) if layer.frozen else Linear()
    router, losses = Router(score=score, select=TopK(k=options.top_k), weigh=layer.weigh), options.losses
    if options.router == "label":
        router, losses = Router(score=Uniform(), select=Label(), weigh=layer.weigh), ()
    count = len(layer.experts)
    config = MoELayer(num_experts=count, router=router, experts=bank, shared=shared, losses=losses)
    return Graft(routed=config, dim=layer.rows.shape[1], tensors=named), [] if note is None else [note]


def balanced_weigh(options: Upcycle, count: int) -> Weigh:
    """Weights of 1 on average, through which the router learns: what parts of one layer, which are summed, need."""
    if options.weigh is not None:
        return options.weigh
    return Raw(scale=float(count)) if options.top_k == 1 else Renormalised(scale=float(options.top_k))


def copies_weigh(options: Upcycle) -> Weigh:
    """Weights that sum to 1: what equal experts need."""
    if options.weigh is not None:
        return options.weigh
    return Constant(value=1.0) if options.top_k == 1 else Renormalised()


def sums_to_one(options: Upcycle) -> bool:
    """Whether the weights of a unit's choices sum to 1 whatever the router says."""
    return one_in_all(copies_weigh(options), options.top_k)


def one_in_all(weigh: Weigh, top_k: int) -> bool:
    """Whether `top_k` choices have weights that sum to 1 whatever the router says."""
    if isinstance(weigh, Constant):
        return weigh.value is None or weigh.value * top_k == 1.0
    return getattr(weigh, "scale", 1.0) == 1.0 and not isinstance(weigh, Raw)


def router_rows(options: Upcycle, place: Place, count: int, inputs: Inputs) -> Tensor:
    """[count, D] fp32: small random rows, or the directions in which clusters of the inputs lie from their mean.

    Raises `UserError` for fewer tokens than rows.
    """
    draws = generator(options.seed, f"{place.path}.router")
    D = place.mlp.dim
    if options.router != "centroids":
        return torch.empty(count, D).normal_(0.0, options.router_std, generator=draws)
    x = inputs(place.path)
    if x.shape[0] < count:
        raise UserError(f"{place.path}: {x.shape[0]} tokens of text give no {count} centroids; give more text")
    _, centres = kmeans(x, count, draws)
    away = centres - x.double().mean(0).cpu()
    size = away.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (away / size * options.router_std * math.sqrt(D)).float()
