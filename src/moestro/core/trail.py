"""The Trail: what a forward pass leaves behind, keyed by (module path, pass), as a frozen value that is returned.

Every layer returns its own trail under the empty path; each parent puts its child's name in front with `under`.
Nothing is stored in modules, globals or context variables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree

from .errors import UserError
from .plan import AnyPlan
from .protocols import Loss
from .pytree import pytree, static
from .stats import Stats

__all__ = ["Key", "Record", "Term", "TermKey", "Trail", "add_stats"]


class Key(NamedTuple):
    """Module path (dotted, as in `named_modules`) and number of the forward pass within one step."""

    path: str
    pass_: int = 0


class TermKey(NamedTuple):
    """One loss term of one layer in one pass."""

    path: str
    pass_: int
    name: str


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """A loss with what it is to be computed from: value = loss.value(stats), contribution = coefficient * value."""

    stats: Stats
    loss: Loss = static()

    def value(self) -> Tensor:
        return self.loss.value(self.stats)


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What one layer says of one pass.

    demand, load: [E] int64 counts of this pass, see `core.plan`. dropped: [] int64, choices lost to capacity.
    terms: name -> Term. plan: without its [T, E] tensors unless the signals asked to keep them.
    """

    plan: AnyPlan | None = None
    demand: Tensor | None = None
    load: Tensor | None = None
    dropped: Tensor | None = None
    terms: Mapping[str, Term] = dataclasses.field(default_factory=dict)


@pytree
@dataclasses.dataclass(frozen=True)
class Trail(Mapping[Key, Record]):
    """A read-only mapping from (module path, pass) to `Record`."""

    records: Mapping[Key, Record] = dataclasses.field(default_factory=dict)

    def __getitem__(self, key: Key | tuple[str, int] | str) -> Record:
        return self.records[Key(key) if isinstance(key, str) else Key(*key)]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def under(self, name: str) -> Trail:
        """The same records, seen from a parent that calls this module `name`."""
        if not self.records:
            return self
        return Trail({Key(f"{name}.{k.path}" if k.path else name, k.pass_): r for k, r in self.records.items()})

    def as_pass(self, pass_: int) -> Trail:
        """The same records, marked as belonging to forward pass number `pass_` of the step."""
        return Trail({Key(k.path, pass_): r for k, r in self.records.items()})

    def __or__(self, other: Trail) -> Trail:  # type: ignore[override]
        """Both trails. The same key twice is an error: a layer that runs twice needs two passes or two paths."""
        if not other.records:
            return self
        if not self.records:
            return other
        twice = self.records.keys() & other.records.keys()
        if twice:
            raise UserError(
                f"layer {next(iter(twice)).path!r} wrote its plan twice in one pass; number the passes with as_pass()"
            )
        return Trail({**self.records, **other.records})

    def plans(self) -> dict[Key, AnyPlan]:
        return {k: r.plan for k, r in self.records.items() if r.plan is not None}

    def terms(self) -> dict[TermKey, Term]:
        return {TermKey(k.path, k.pass_, n): t for k, r in self.records.items() for n, t in r.terms.items()}

    def losses(self) -> dict[TermKey, Tensor]:
        """Every loss term's value, without its coefficient."""
        return {key: term.value() for key, term in self.terms().items()}

    def loss(self) -> Tensor | float:
        """The sum of coefficient * value over all terms with a coefficient; 0.0 where there is none."""
        total: Tensor | float = 0.0
        for term in self.terms().values():
            if term.loss.coefficient:
                total = total + term.loss.coefficient * term.value()
        return total

    def within(self, totals: Mapping[TermKey, Stats]) -> Trail:
        """The trail with every term evaluated at `totals`, keeping this part's gradient (see `Stats.within`)."""
        out: dict[Key, Record] = {}
        for k, r in self.records.items():
            terms = {
                n: dataclasses.replace(t, stats=t.stats.within(totals[TermKey(k.path, k.pass_, n)]))
                for n, t in r.terms.items()
            }
            out[k] = dataclasses.replace(r, terms=terms)
        return Trail(out)

    def counts(self) -> dict[str, Tensor]:
        """path -> [E] int64: demand summed over passes. This is what routers step on."""
        out: dict[str, Tensor] = {}
        for k, r in self.records.items():
            if r.demand is not None:
                out[k.path] = out[k.path] + r.demand if k.path in out else r.demand
        return out

    def detach(self) -> Trail:
        """The trail cut from the graph, for keeping after the step."""
        return _pytree.tree_map_only(Tensor, lambda t: t.detach(), self)


def add_stats(parts: Iterable[Mapping[TermKey, Stats]]) -> dict[TermKey, Stats]:
    """Sum statistics of the same terms over micro-batches."""
    out: dict[TermKey, Stats] = {}
    for part in parts:
        for key, stats in part.items():
            out[key] = out[key] + stats if key in out else stats
    return out
