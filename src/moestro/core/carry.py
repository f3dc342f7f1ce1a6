"""The Carry: what one layer hands to later ones, and the plans that are given to layers.

Three kinds of content, each with its own addressing:
    state   flows with the stream: a router reads what the previous routed layer wrote (router state, halos).
    ahead   plans or forecasts made early, addressed by distance in routed layers (0 = the next one).
    own     belongs to one module, addressed by its path: attention caches, replayed plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .plan import AnyPlan
from .pytree import changed, pytree, static

__all__ = ["Carry", "Forecast", "Live", "Replay"]


@pytree
@dataclasses.dataclass(frozen=True)
class Replay:
    """A plan whose choices (expert, kept) are binding; weights are recomputed by the layer's own router."""

    plan: AnyPlan


@pytree
@dataclasses.dataclass(frozen=True)
class Live:
    """A plan whose choices and weights are both binding; gradient flows to the router that made them."""

    plan: AnyPlan


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """A guess of demand. Stores, prefetch and placement may act on it; no output depends on it.

    expert: [T, K] int64 guessed choices or None. demand: [E] guessed counts or None. ahead: distance in routed layers.
    """

    expert: Tensor | None = None
    demand: Tensor | None = None
    ahead: int = static(default=0)


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Carry:
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ahead: Mapping[int, Live | Forecast] = dataclasses.field(default_factory=dict)
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def at(self, name: str) -> Carry:
        """What the child called `name` may see: the stream, and its own things under relative paths."""
        if not self.own:
            return self
        prefix = name + "."
        inside = {k[len(prefix) :]: v for k, v in self.own.items() if k.startswith(prefix)}
        if name in self.own:
            inside[""] = self.own[name]
        return changed(self, own=inside)

    def back(self, name: str, child: Carry) -> Carry:
        """This carry after the child called `name` returned `child`: its stream, and its own things put back."""
        if not self.own and not child.own:
            return child
        prefix = name + "."
        own = {k: v for k, v in self.own.items() if k != name and not k.startswith(prefix)}
        own |= {prefix + k if k else name: v for k, v in child.own.items()}
        return changed(child, own=own)

    def apart(self, names: Sequence[str]) -> list[Mapping[str, Any]]:
        """What `at` shows each of these children of its own, found in one reading: for a parent of many."""
        inside: dict[str, dict[str, Any]] = {name: {} for name in names}
        for key, value in self.own.items():
            for head, rest in _splits(key):
                if head in inside:
                    inside[head][rest] = value
                    break
        return [inside[name] for name in names]

    def together(self, names: Sequence[str], parts: Sequence[Mapping[str, Any]], stream: Carry) -> Carry:
        """The inverse of `apart`: `stream`, with the own things of these children and the other own things of self."""
        mine = set(names)
        own = {k: v for k, v in self.own.items() if not any(head in mine for head, _ in _splits(k))}
        for name, part in zip(names, parts, strict=True):
            for key, value in part.items():
                own[f"{name}.{key}" if key else name] = value
        return changed(stream, own=own)

    def put(self, name: str, value: Any) -> Carry:
        """This carry with `value` as the child's own: `back(name, at(name).keep(value))`."""
        return changed(self, own={**self.own, name: value})

    @property
    def mine(self) -> Any:
        """What is addressed to this very module, or None."""
        return self.own.get("")

    def keep(self, value: Any) -> Carry:
        """This carry with `value` as this module's own."""
        return changed(self, own={**self.own, "": value})

    def with_state(self, name: str, value: Any) -> Carry:
        return changed(self, state={**self.state, name: value})

    def take(self) -> tuple[Live | Forecast | None, Carry]:
        """What was made ahead for the routed layer that asks, and the carry for those after it."""
        if not self.ahead:
            return None, self
        rest = {d - 1: v for d, v in self.ahead.items() if d > 0}
        return self.ahead.get(0), changed(self, ahead=rest)

    def give(self, distance: int, value: Live | Forecast) -> Carry:
        """Hand a plan or forecast to the routed layer `distance` routed layers after the next one."""
        return changed(self, ahead={**self.ahead, distance: value})


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Every way to read a path as one child's and the rest: ("a.b", ""), ("a", "b")."""
    yield key, ""
    end = key.rfind(".")
    while end > 0:
        yield key[:end], key[end + 1 :]
        end = key.rfind(".", 0, end)
