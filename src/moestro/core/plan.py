"""The Plan: which units go to which experts, with which weight. Everything else in the library writes or reads one.

Axis letters: T units, K choices, E experts, G groups, C capacity, N tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .pytree import changed, pytree, static

__all__ = [
    "SCHEMA",
    "AnyPlan",
    "Dense",
    "ExpertChoice",
    "Plan",
    "demand",
    "from_tensors",
    "load",
    "merge",
    "num_units",
    "slim",
    "to_tensors",
]

SCHEMA = 1  # version of the layout written by `to_tensors`

VIRTUAL_KINDS = ("null", "copy")


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A table of choices: every unit lists its experts.

    Shapes:
        expert: [T, K] int64; the k-th choice of unit t, -1 = none. Ids >= num_experts are virtual, see `virtual`.
        weight: [T, K] fp32; the combine weight, 0 where there is no row. Differentiable with respect to its router.
        kept: [T, K] bool or None; False = lost to capacity. `expert` still says what was chosen.
        probs, logits: [T, E'] fp32 or None; the distribution selected from (after mixing, before noise and bias) and
            the clean logits; E' = num_experts + len(virtual).
        valid: [T] bool or None; False = padding, routed nowhere, counted nowhere, in no loss.
        owner: [N] int64 or None; token -> unit, where a unit is more than one token.
        extra: tensors that one router's own losses need, documented by that router.
        meta: labels per unit (task, modality, ...) for later analysis.

    Static:
        num_experts: E, the number of real experts.
        virtual: what the ids from E on mean, one entry per id: "null" adds nothing, "copy" adds weight * x.
        kind: what a unit is: "token", "sequence", "image", "batch".
        capacity: the most rows an expert may receive, where a limit fixed it.
        complete: a promise that every entry of `expert` is a real expert and nothing is dropped or padded, so the
            number of rows is T*K without looking at the data. `check` verifies it.
    """

    expert: Tensor
    weight: Tensor
    num_experts: int = static()
    kept: Tensor | None = None
    probs: Tensor | None = None
    logits: Tensor | None = None
    valid: Tensor | None = None
    owner: Tensor | None = None
    extra: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    meta: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    virtual: tuple[str, ...] = static(default=())
    kind: str = static(default="token")
    capacity: int | None = static(default=None)
    complete: bool = static(default=False)

    def active(self) -> Tensor:
        """[T, K] bool: choices that were made by valid units, dropped or not, virtual or not."""
        chosen = self.expert >= 0
        return chosen if self.valid is None else chosen & self.valid[:, None]

    def routed(self) -> Tensor:
        """[T, K] bool: choices that become rows: real experts, valid units, not lost to capacity."""
        rows = self.active() & (self.expert < self.num_experts)
        return rows if self.kept is None else rows & self.kept

    def check(self) -> Plan:
        """Return the plan itself if it is well formed, else raise `UserError`. Looks at values: not for inner loops."""
        if self.expert.ndim != 2 or self.expert.dtype != torch.int64:
            _bad(f"expert must be [T, K] int64, not {_about(self.expert)}")
        T, K = self.expert.shape
        ids = self.num_experts + len(self.virtual)
        _expect("weight", self.weight, (T, K), floating=True)
        _expect("kept", self.kept, (T, K), dtype=torch.bool)
        _expect("valid", self.valid, (T,), dtype=torch.bool)
        _expect("probs", self.probs, (T, ids), floating=True)
        _expect("logits", self.logits, (T, ids), floating=True)
        _check_virtual(self.virtual)
        if self.expert.numel() and (int(self.expert.min()) < -1 or int(self.expert.max()) >= ids):
            _bad(f"expert ids must lie in -1..{ids - 1}, found {int(self.expert.min())}..{int(self.expert.max())}")
        silent = ~self.active() if self.kept is None else ~(self.active() & self.kept)
        if bool((self.weight.detach()[silent] != 0).any()):
            _bad("weight must be 0 where a choice is absent, padded or dropped")
        if not bool(torch.isfinite(self.weight.detach()).all()):
            _bad("weight has a NaN or an infinity")
        if self.owner is not None:
            _check_owner(self.owner, T)
        if self.complete and not bool(self.routed().all()):
            _bad("the plan promises `complete`, but some choices are absent, virtual, padded or dropped")
        if self.capacity is not None and self.num_experts and int(load(self).max()) > self.capacity:
            _bad(f"an expert receives {int(load(self).max())} rows, over the capacity of {self.capacity}")
        return self


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoice:
    """Experts choose units: each expert of each group lists its C units.

    Shapes:
        unit: [G, E, C] int64; index of the chosen unit in 0..T-1, -1 = an empty slot.
        weight: [G, E, C] fp32; 0 at empty slots.
        probs, logits: [T, E] fp32 or None.
        valid: [T] bool or None. owner: [N] int64 or None. extra, meta: as in `Plan`.

    Static: num_units T, kind. Groups are images, sequences or the whole batch (G = 1).
    """

    unit: Tensor
    weight: Tensor
    num_units: int = static()
    probs: Tensor | None = None
    logits: Tensor | None = None
    valid: Tensor | None = None
    owner: Tensor | None = None
    extra: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    meta: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    kind: str = static(default="token")

    @property
    def num_experts(self) -> int:
        return self.unit.shape[1]

    def routed(self) -> Tensor:
        """[G, E, C] bool: slots that become rows."""
        taken = self.unit >= 0
        if self.valid is None:
            return taken
        return taken & self.valid[self.unit.clamp_min(0)]

    def check(self) -> ExpertChoice:
        """Return the plan itself if it is well formed, else raise `UserError`."""
        if self.unit.ndim != 3 or self.unit.dtype != torch.int64:
            _bad(f"unit must be [G, E, C] int64, not {_about(self.unit)}")
        _expect("weight", self.weight, tuple(self.unit.shape), floating=True)
        _expect("valid", self.valid, (self.num_units,), dtype=torch.bool)
        _expect("probs", self.probs, (self.num_units, self.num_experts), floating=True)
        _expect("logits", self.logits, (self.num_units, self.num_experts), floating=True)
        if self.unit.numel() and (int(self.unit.min()) < -1 or int(self.unit.max()) >= self.num_units):
            _bad(f"unit ids must lie in -1..{self.num_units - 1}")
        if bool((self.weight.detach()[~self.routed()] != 0).any()):
            _bad("weight must be 0 at empty slots and padding")
        if self.owner is not None:
            _check_owner(self.owner, self.num_units)
        return self


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """Every expert meets every unit.

    Shapes: weight [T, E] fp32; probs, logits [T, E] fp32 or None; valid [T] bool or None; owner [N] int64 or None.
    """

    weight: Tensor
    probs: Tensor | None = None
    logits: Tensor | None = None
    valid: Tensor | None = None
    owner: Tensor | None = None
    extra: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    meta: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    kind: str = static(default="token")

    @property
    def num_experts(self) -> int:
        return self.weight.shape[1]

    def routed(self) -> Tensor:
        """[T, E] bool: all experts of all valid units."""
        every = torch.ones_like(self.weight, dtype=torch.bool)
        return every if self.valid is None else every & self.valid[:, None]

    def check(self) -> Dense:
        """Return the plan itself if it is well formed, else raise `UserError`."""
        if self.weight.ndim != 2:
            _bad(f"weight must be [T, E], not {_about(self.weight)}")
        T, E = self.weight.shape
        _expect("weight", self.weight, (T, E), floating=True)
        _expect("probs", self.probs, (T, E), floating=True)
        _expect("logits", self.logits, (T, E), floating=True)
        _expect("valid", self.valid, (T,), dtype=torch.bool)
        if self.valid is not None and bool((self.weight.detach()[~self.valid] != 0).any()):
            _bad("weight must be 0 for padding")
        if self.owner is not None:
            _check_owner(self.owner, T)
        return self


AnyPlan = Plan | ExpertChoice | Dense

_TYPES: dict[str, type] = {"Plan": Plan, "ExpertChoice": ExpertChoice, "Dense": Dense}


def num_units(plan: AnyPlan) -> int:
    """T, the number of units that the plan speaks of (padding included)."""
    if isinstance(plan, ExpertChoice):
        return plan.num_units
    return plan.expert.shape[0] if isinstance(plan, Plan) else plan.weight.shape[0]


def demand(plan: AnyPlan) -> Tensor:
    """[E] int64: how many valid units chose each real expert, before capacity. Local to the rank."""
    if isinstance(plan, Plan):
        return _count(plan.expert, plan.active() & (plan.expert < plan.num_experts), plan.num_experts)
    return load(plan)


def load(plan: AnyPlan) -> Tensor:
    """[E] int64: how many rows each real expert receives, after capacity. Local to the rank."""
    if isinstance(plan, Plan):
        return _count(plan.expert, plan.routed(), plan.num_experts)
    if isinstance(plan, ExpertChoice):
        return plan.routed().sum(dim=(0, 2))
    return plan.routed().sum(dim=0)


def slim(plan: AnyPlan, keep: frozenset[str] = frozenset()) -> AnyPlan:
    """The plan without its [T, E] tensors (`probs`, `logits`, `extra`), except those named in `keep`."""
    gone: dict[str, Any] = {n: None for n in ("probs", "logits") if n not in keep and getattr(plan, n) is not None}
    if "extra" not in keep and plan.extra:
        gone["extra"] = {}
    return changed(plan, **gone) if gone else plan


def merge(plans: Sequence[Plan]) -> Plan:
    """One plan for the units of several (micro-batches of one layer), in the order given.

    Tables of different K are padded with -1. A field present in some plans only is dropped, except `valid` and `kept`,
    which are filled with True. Owners are shifted to the merged unit numbers.
    """
    if not plans:
        raise UserError("merge needs at least one plan")
    first = plans[0]
    for p in plans:
        if (p.num_experts, p.virtual, p.kind) != (first.num_experts, first.virtual, first.kind):
            raise UserError("only plans over the same experts and the same kind of unit can be merged")
    K = max(p.expert.shape[1] for p in plans)

    def table(name: str, fill: float | bool) -> Tensor | None:
        parts = [getattr(p, name) for p in plans]
        if all(t is None for t in parts):
            return None
        made = [torch.ones_like(p.expert, dtype=torch.bool) if t is None else t for p, t in zip(plans, parts)]
        return torch.cat([torch.nn.functional.pad(t, (0, K - t.shape[1]), value=fill) for t in made])

    def column(name: str) -> Tensor | None:
        parts = [getattr(p, name) for p in plans]
        if name == "valid" and any(t is not None for t in parts):
            parts = [
                p.expert.new_ones(p.expert.shape[0], dtype=torch.bool) if t is None else t for p, t in zip(plans, parts)
            ]
        return None if any(t is None for t in parts) else torch.cat(parts)

    def mapping(name: str) -> dict[str, Tensor]:
        shared = set.intersection(*(set(getattr(p, name)) for p in plans))
        return {k: torch.cat([getattr(p, name)[k] for p in plans]) for k in sorted(shared)}

    owner = None
    if all(p.owner is not None for p in plans):
        base, parts = 0, []
        for p in plans:
            assert p.owner is not None
            parts.append(torch.where(p.owner >= 0, p.owner + base, p.owner))
            base += p.expert.shape[0]
        owner = torch.cat(parts)
    expert, weight = table("expert", -1), table("weight", 0.0)
    assert expert is not None
    assert weight is not None
    return Plan(
        expert=expert,
        weight=weight,
        num_experts=first.num_experts,
        kept=table("kept", True),
        probs=column("probs"),
        logits=column("logits"),
        valid=column("valid"),
        owner=owner,
        extra=mapping("extra"),
        meta=mapping("meta"),
        virtual=first.virtual,
        kind=first.kind,
        complete=all(p.complete and p.expert.shape[1] == K for p in plans),
    )


def to_tensors(plan: AnyPlan) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The plan as named tensors and a JSON-able header; `from_tensors` rebuilds it."""
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"schema": SCHEMA, "type": type(plan).__name__}
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if field.metadata.get("static"):
            header[field.name] = list(value) if isinstance(value, tuple) else value
        elif field.name in ("extra", "meta"):
            tensors |= {f"{field.name}.{k}": v.detach() for k, v in value.items()}
        elif value is not None:
            tensors[field.name] = value.detach()
    return tensors, header


def from_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> AnyPlan:
    """Rebuild and check a plan written by `to_tensors`. Raises `UserError` for another schema or unknown fields."""
    if header.get("schema") != SCHEMA:
        raise UserError(f"this plan has schema {header.get('schema')!r}; this version reads schema {SCHEMA}")
    cls = _TYPES.get(str(header.get("type")))
    if cls is None:
        raise UserError(f"unknown plan type {header.get('type')!r}; known: {', '.join(_TYPES)}")
    values: dict[str, Any] = {"extra": {}, "meta": {}}
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name, tensor in tensors.items():
        group, _, key = name.partition(".")
        if key and group in ("extra", "meta"):
            values[group][key] = tensor
        elif name in known and not known[name].metadata.get("static"):
            values[name] = tensor
        else:
            raise UserError(f"a {cls.__name__} has no tensor {name!r}")
    for name, value in header.items():
        if name in ("schema", "type"):
            continue
        if name not in known or not known[name].metadata.get("static"):
            raise UserError(f"a {cls.__name__} has no field {name!r}")
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        plan = cls(**values)
    except TypeError as error:
        raise UserError(f"incomplete {cls.__name__}: {error}") from None
    return plan.check()


def _count(expert: Tensor, mask: Tensor, num_experts: int) -> Tensor:
    slot = torch.where(mask, expert, num_experts).reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert.device)
    return counts.scatter_add_(0, slot, torch.ones_like(slot))[:num_experts]


def _about(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _bad(message: str) -> None:
    raise UserError(f"bad plan: {message}")


def _expect(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype | None = None,
    floating: bool = False,
) -> None:
    if tensor is None:
        return
    wrong = tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype)
    if floating:
        wrong = wrong or tensor.dtype not in (torch.float32, torch.float64)
    if wrong:
        want = "fp32 or fp64" if floating else str(dtype).removeprefix("torch.")
        _bad(f"{name} must be {list(shape)} {want}, not {_about(tensor)}")


def _check_virtual(virtual: tuple[str, ...]) -> None:
    for kind in virtual:
        if kind not in VIRTUAL_KINDS:
            _bad(f"virtual ids are {' or '.join(map(repr, VIRTUAL_KINDS))}, not {kind!r}")


def _check_owner(owner: Tensor, units: int) -> None:
    if owner.ndim != 1 or owner.dtype != torch.int64:
        _bad(f"owner must be [N] int64, not {_about(owner)}")
    if owner.numel() and (int(owner.min()) < -1 or int(owner.max()) >= units):
        _bad(f"owner must name units in 0..{units - 1} (-1 for none)")
