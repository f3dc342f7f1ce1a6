"""Putting adapters into a model by name, and merging, unmerging and removing them."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.errors import UserError, did_you_mean
from ..experts.bank import Bank
from ..nn.feedforward import FeedForward, PlainFeedForward
from .config import Adapter, LoRA, Mixture
from .linear import AdaptedFeedForward, AdaptedLinear
from .lora.bank import LoRABank, adaptable, parts_of
from .lora.linear import LoRAFeedForward, LoRALinear
from .policy import apply_policy

__all__ = ["Attached", "Place", "adapters", "attach", "attach_at", "factors", "merge", "places", "unload", "unmerge"]

GROUPS: dict[str, tuple[str, ...]] = {
    "experts": ("gate", "up", "down"),
    "shared": ("gate", "up", "down"),
    "ffn": ("gate", "up", "down"),
    "attention": ("q", "k", "v", "o"),
}


@dataclasses.dataclass(frozen=True)
class Attached:
    """What adapters were put into: path -> names of the adapted parts; and how many numbers they train.

    lines: what to print at the start of a run, one line per kind of place, one for the routers.
    """

    places: dict[str, tuple[str, ...]]
    trainable: int
    total: int
    lines: tuple[str, ...]


@dataclasses.dataclass
class Place:
    """One module that can take adapters, or that has some. group: its logical name, or "" for other linear layers."""

    path: str
    module: nn.Module
    group: str
    parts: tuple[str, ...]
    wanted: set[str] = dataclasses.field(default_factory=set)


def attach(model: nn.Module, config: Adapter) -> Attached:
    """Freeze the model and put adapters where `config.targets` says; returns what was done.

    The model is changed in place and computes what it computed before (B starts at zero). The model's own routers
    follow `config.router`. Raises `UserError`, and changes nothing, where a target matches nothing, where a place has
    adapters already or can have none, and where only some of gate, up and down of a bank or feed-forward layer are
    named without `partial=True`.
    """
    found = list(places(model))
    _choose(found, config)
    return _attach(model, config, [p for p in found if p.wanted])


def attach_at(model: nn.Module, config: Adapter, where: Mapping[str, Iterable[str]]) -> Attached:
    """`attach` at paths of modules, each with the names of its parts, in place of `config.targets`."""
    found = {p.path: p for p in places(model)}
    for path, parts in where.items():
        if path not in found:
            raise UserError(f"adapters attached to nothing: the model has no {path!r}{did_you_mean(path, found)}")
        found[path].wanted |= set(parts) & set(found[path].parts)
    return _attach(model, config, [p for p in found.values() if p.wanted])


def _attach(model: nn.Module, config: Adapter, chosen: list[Place]) -> Attached:
    if not chosen:
        raise UserError("adapters attached to nothing")
    _check(chosen, config)
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        made = [(place.path, _adapted(place, config, chosen)) for place in chosen]
    except UserError:
        for p, moves in before:
            p.requires_grad_(moves)
        raise
    model.requires_grad_(False)
    for path, module in made:
        _put(model, path, module)
    for module in adapters(model).values():
        _trainable(module)
    policy = apply_policy(model, config.router)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    kinds: dict[str, int] = {}
    for place in chosen:
        label = f"{place.group or 'linear'} {'+'.join(p for p in place.parts if p in place.wanted)}".strip()
        kinds[label] = kinds.get(label, 0) + 1
    lines = [f"adapters on {n} x {label}" for label, n in kinds.items()]
    lines.append(f"{trainable:,} of {total:,} parameters train ({trainable / max(1, total):.2%})")
    done = {p.path: tuple(q for q in p.parts if q in p.wanted) for p in chosen}
    return Attached(done, trainable, total, (*lines, *policy.lines))


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> adapted module, in the order of the model."""
    kinds = (LoRABank, AdaptedLinear, AdaptedFeedForward)
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds)}


def merge(model: nn.Module, keep: bool = True) -> None:
    """Add all updates into the weights. keep: hold copies, so that `unmerge` gives the same bits back."""
    found = _any(model)
    for path, module in found.items():
        if not hasattr(module, "merge"):
            raise UserError(f"{path}: a mixture of adapters depends on the token and cannot be merged into a weight")
    for module in found.values():
        module.merge(keep)  # type: ignore[operator]


def unmerge(model: nn.Module) -> None:
    """Take merged updates out of the weights."""
    for module in _any(model).values():
        if hasattr(module, "unmerge"):
            module.unmerge()  # type: ignore[operator]


def unload(model: nn.Module) -> None:
    """Remove the adapters; what was merged stays in the weights. All parameters stay frozen as they are."""
    for path, module in _any(model).items():
        _put(model, path, module.unload())  # type: ignore[operator]


def factors(model: nn.Module) -> dict[str, Tensor]:
    """Full name -> tensor of everything that adapters have added to the model."""
    names = {f"{path}.{n}" for path, m in adapters(model).items() for n in _own(m)}
    return {n: p for n, p in model.named_parameters() if n in names}


# ---------------------------------------------------------------------------------------------------------------------


def _any(model: nn.Module) -> dict[str, nn.Module]:
    found = adapters(model)
    if not found:
        raise UserError("the model has no adapters; attach some first")
    return found


def _own(module: nn.Module) -> set[str]:
    """Names, below the module, of what an adapter has added."""
    frozen = module._frozen if isinstance(module, LoRABank) else tuple(n for n in module._parameters)
    return {n for n, _ in module.named_parameters() if n not in frozen}


def _trainable(module: nn.Module) -> None:
    own = _own(module)
    for name, parameter in module.named_parameters():
        if name in own:
            parameter.requires_grad_(True)


def places(model: nn.Module) -> Iterator[Place]:
    """Every module that can take adapters, or that looks as if it should."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, LoRABank | AdaptedLinear | AdaptedFeedForward):
            inside.update(id(m) for m in module.modules())
            group = "" if isinstance(module, AdaptedLinear) else "ffn"
            parts = GROUPS.get(group, ("weight",))
            if isinstance(module, LoRABank):
                group, parts = _bank_group(module), parts_of(module.source)
            yield Place(path, module, group, parts)
        elif isinstance(module, Bank):
            inside.update(id(m) for m in module.modules())
            yield Place(path, module, _bank_group(module), parts_of(module) or GROUPS["experts"])
        elif isinstance(module, FeedForward | PlainFeedForward):
            yield Place(path, module, "ffn", GROUPS["ffn"])
        elif vars(type(module)).get("role") == "attention":
            maps = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear | AdaptedLinear)}
            for name, child in maps.items():
                inside.update(id(m) for m in child.modules())
                yield Place(f"{path}.{name}".lstrip("."), child, "attention", (name,))
            if not maps:
                yield Place(path, module, "attention", GROUPS["attention"])
        elif isinstance(module, nn.Linear):
            yield Place(path, module, "", ("weight",))


def _bank_group(bank: Bank) -> str:
    return "shared" if bank.role == "shared_expert" else "experts"


def layer_of(path: str) -> int | None:
    """The first number in a path."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return None if number is None else int(number[1])


def _choose(found: list[Place], config: Adapter) -> None:
    """Mark what the targets name; every one must name something."""
    for target in config.targets:
        hits = 0
        for place in found:
            if config.layers and layer_of(place.path) not in config.layers:
                continue
            names = _named(place, target)
            place.wanted |= names
            hits += len(names)
        if not hits:
            known = {p.group or p.path for p in found} | {f"{p.group}.{q}" for p in found for q in p.parts if p.group}
            where = f" in layers {', '.join(map(str, config.layers))}" if config.layers else ""
            raise UserError(
                f"adapters attached to nothing: the target {target!r} matches no part of the model{where}"
                f"{did_you_mean(target, known)}; it has {_present(found)}"
            )


def _named(place: Place, target: str) -> set[str]:
    group, _, part = target.partition(".")
    if group in GROUPS:
        if place.group != group:
            return set()
        return {p for p in place.parts if part in ("", p)}
    if not isinstance(place.module, nn.Linear | AdaptedLinear):
        return set()
    hit = place.path == target or place.path.endswith(f".{target}") or fnmatch.fnmatchcase(place.path, target)
    return set(place.parts) if hit else set()


def _present(places: list[Place]) -> str:
    groups = dict.fromkeys(p.group for p in places if p.group)
    parts = {g: dict.fromkeys(q for p in places if p.group == g for q in p.parts) for g in groups}
    said = [f"{g} ({', '.join(parts[g])})" for g in groups]
    linear = sum(not p.group for p in places)
    said += [f"{linear} other linear layers, by path"] if linear else []
    return ", ".join(said) or "nothing that takes adapters"


def _check(chosen: list[Place], config: Adapter) -> None:
    for place in chosen:
        module = place.module
        if isinstance(module, LoRABank | AdaptedLinear | AdaptedFeedForward):
            raise UserError(f"{place.path}: has adapters already; unload them first")
        if isinstance(module, Bank):
            if isinstance(config, Mixture):
                raise UserError(f"{place.path}: a mixture of adapters goes on linear layers, not on banks of experts")
            fits, why = adaptable(module)
            if not fits:
                raise UserError(f"{place.path}: {why}; it cannot be adapted")
        elif place.group and type(module) is not FeedForward and not isinstance(module, nn.Linear):
            raise UserError(f"{place.path}: {type(module).__name__} is not known here; it cannot be adapted")
        missing = [p for p in place.parts if p not in place.wanted]
        if missing and place.group != "attention" and not getattr(config, "partial", False):
            raise UserError(
                f"{place.path}: adapters on {', '.join(sorted(place.wanted))} but not on {', '.join(missing)}; name "
                f"the whole ({place.group!r}), or say partial=True to leave parts out on purpose"
            )


def _adapted(place: Place, config: Adapter, chosen: list[Place]) -> nn.Module:
    module: Any = place.module
    parts = tuple(p for p in place.parts if p in place.wanted)
    if isinstance(config, Mixture):
        from .mixture.linear import mixture_of

        layers = sorted({-1 if (n := layer_of(p.path)) is None else n for p in chosen})
        own = layer_of(place.path)
        return mixture_of(module, config, place.path, parts, layers.index(-1 if own is None else own), len(layers))
    assert isinstance(config, LoRA)
    if isinstance(module, Bank):
        alone = place.group == "shared"  # joined speaks of stacks
        return LoRABank(module, config.replace(joined=False) if alone else config, parts, place.path)
    if isinstance(module, FeedForward):
        return LoRAFeedForward(module, config, parts, place.path)
    return LoRALinear(module, config, place.path)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
