"""Fewer or more experts, with different counts per layer. Each function returns (new model, Receipt)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...moe.layer import MoELayer
from ..change.conduct import Made, Seen, choose, conduct, generator, watch
from ..change.graft import Graft, graft
from ..change.samples import Samples
from ..config import AddExperts, MergeExperts, Prune
from ..receipt import Receipt
from .parts import Parts, apart, mean, together
from .scores import loads, output_similarity, weight_similarity, weighted_norms

__all__ = ["add", "merge", "prune", "routed_paths"]

Converted = tuple[nn.Module, Receipt]
Change = Callable[[str, MoELayer, Parts, Sequence[Seen], int], tuple[Graft, str]]


def routed_paths(model: nn.Module, layers: tuple[int, ...] | None) -> list[str]:
    """Paths of the routed layers that the options name. Raises `UserError` where there is none."""
    return choose([p for p, m in model.named_modules() if isinstance(m, MoELayer)], layers, "routed layer")


def observe(model: nn.Module, paths: Sequence[str], samples: Samples) -> dict[str, list[Seen]]:
    """path -> what the layer met, per batch."""
    out: dict[str, list[Seen]] = {p: [] for p in paths}
    for batch in samples.batches:
        for path, seen in watch(model, paths, batch).items():
            out[path].append(seen)
    return out


def _resize(options: Prune | MergeExperts | AddExperts, model: nn.Module, change: Change, **given: Any) -> Converted:
    paths = routed_paths(model, options.layers)
    counts = options.counts(len(paths))

    def make(samples: Samples) -> Made:
        seen = observe(model, paths, samples) if options.reads_text else {p: [] for p in paths}
        grafts: dict[str, Graft] = {}
        notes: list[str] = []
        invented: dict[str, str] = {}
        for path, count in zip(paths, counts, strict=True):
            layer: Any = model.get_submodule(path)
            with torch.no_grad():
                grafts[path], note = change(path, layer, apart(layer), seen[path], count)
            notes.append(f"{path}: {note}")
            if isinstance(options, AddExperts) and options.noise:
                names = [n for n in grafts[path].tensors if n.startswith(("experts.", "router."))]
                invented |= {f"{path}.{n}": f"noise on the {count} new experts" for n in names}
        return Made(model=graft(model, grafts), paths=paths, invented=invented, notes=notes)

    return conduct(options, model, make, **given)


def _fewer(path: str, layer: MoELayer, count: int) -> None:
    if count > layer.config.num_experts:
        raise UserError(f"{path}: {count} of {layer.config.num_experts} experts cannot be kept")
    if count < (k := getattr(layer.router, "top_k", 1) or 1):
        raise UserError(f"{path}: {count} experts are fewer than the {k} that every token meets")


def prune(options: Prune, model: nn.Module, **given: Any) -> Converted:
    """Only the best experts of each layer and their router rows; equal scores keep the lower index."""

    def change(path: str, layer: MoELayer, parts: Parts, seen: Sequence[Seen], count: int) -> tuple[Graft, str]:
        _fewer(path, layer, count)
        ids = kept(options.score, layer, parts, seen, count)
        graft = together(layer, parts, [parts.experts[i] for i in ids], [parts.rows[i] for i in ids], ids)
        return graft, f"experts {ids} kept"

    return _resize(options, model, change, **given)


def kept(score: str, layer: MoELayer, parts: Parts, seen: Sequence[Seen], count: int) -> list[int]:
    """Ascending ids of the `count` experts to keep."""
    E = layer.config.num_experts
    met = loads(seen, E)
    if score in ("load", "weighted_norm"):
        worth = met.double() if score == "load" else weighted_norms(layer, seen)
        return sorted(worth.argsort(descending=True, stable=True)[:count].tolist())
    alike = output_similarity(layer, seen) if score == "output_similarity" else weight_similarity(parts)
    left = list(range(E))
    while len(left) > count:
        pairs = [(float(alike[a, b]), -a, -b) for i, a in enumerate(left) for b in left[i + 1 :]]
        _, a, b = max(pairs)
        left.remove(-b if met[-b] <= met[-a] else -a)
    return left


def merge(options: MergeExperts, model: nn.Module, **given: Any) -> Converted:
    """The two most similar groups become one until `keep` are left (average linkage); means are weighted by load."""

    def change(path: str, layer: MoELayer, parts: Parts, seen: Sequence[Seen], count: int) -> tuple[Graft, str]:
        _fewer(path, layer, count)
        outputs = options.score == "output_similarity"
        found = groups(output_similarity(layer, seen) if outputs else weight_similarity(parts), count)
        met = [float(n) for n in loads(seen, layer.config.num_experts)]
        experts = [mean([parts.experts[i] for i in g], [met[i] for i in g]) for g in found]
        rows = [mean([parts.rows[i] for i in g], [met[i] for i in g]) if parts.rows[0] else {} for g in found]
        return together(layer, parts, experts, rows, [g[0] for g in found]), f"groups {found}"

    return _resize(options, model, change, **given)


def groups(alike: Tensor, count: int) -> list[list[int]]:
    """Agglomerative groups by mean similarity, each ascending, in the order of their first members."""
    found = [[i] for i in range(alike.shape[0])]
    while len(found) > count:
        pairs = [
            (float(alike[a][:, b].mean()), -i, -j) for i, a in enumerate(found) for j, b in enumerate(found) if i < j
        ]
        _, i, j = max(pairs)
        found[-i] = sorted(found[-i] + found.pop(-j))
    return sorted(found)


def add(options: AddExperts, model: nn.Module, **given: Any) -> Converted:
    """New experts after the old ones: copies of the highest scored ones, with noise."""

    def change(path: str, layer: MoELayer, parts: Parts, seen: Sequence[Seen], count: int) -> tuple[Graft, str]:
        E = layer.config.num_experts
        worth = torch.zeros(E)
        if options.score == "load":
            worth = loads(seen, E).double()
        elif options.score == "weighted_norm":
            worth = weighted_norms(layer, seen)
        order = worth.argsort(descending=True, stable=True).tolist()
        new = [order[i % E] for i in range(count)]
        experts, rows = list(parts.experts), list(parts.rows)
        for i, e in enumerate(new):
            draws = generator(options.seed, f"{path}.{E + i}")
            experts.append(_noisy(parts.experts[e], options.noise, draws))
            rows.append(_noisy(parts.rows[e], options.noise, draws))
        return together(layer, parts, experts, rows, [*range(E), *new]), f"new experts are copies of {new}"

    return _resize(options, model, change, **given)


def _noisy(tensors: Any, noise: float, draws: torch.Generator) -> dict[str, Tensor]:
    if not noise:
        return dict(tensors)
    out = {}
    for name, t in sorted(tensors.items()):
        width = noise * float(t.double().std(correction=0))
        out[name] = t + torch.empty(t.shape).normal_(0.0, width, generator=draws).to(t)
    return out
