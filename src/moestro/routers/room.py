"""How much room an expert has, and which units share it."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple, overload

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.signals import Signals

__all__ = ["Groups", "groups_of", "share"]


class Groups(NamedTuple):
    """of: [T] int64, the group of each unit, 0..count-1. size: [count] int64, valid units in each. most: a static bound
    on the size of a group. count: number of groups."""

    of: Tensor
    size: Tensor
    most: int
    count: int


def groups_of(signals: Signals, like: Tensor, per: str) -> Groups:
    """The units of the batch as one group, or as one group per segment that has a valid unit (looks at values; where
    no unit is valid, one group of nobody)."""
    T, device = like.shape[0], like.device
    valid = signals.valid
    if per == "batch":
        whole = torch.tensor(T, device=device) if valid is None else valid.sum()
        return Groups(torch.zeros(T, dtype=torch.int64, device=device), whole.view(1), T, 1)
    assert signals.segment is not None
    of, size = torch.ops.moestro.groups_of_segments(signals.segment, valid)
    return Groups(of, size, size.max().item(), size.shape[0])  # type: ignore[arg-type]


_LIBRARY = torch.library.Library("moestro", "FRAGMENT")
_LIBRARY.define("groups_of_segments(Tensor segment, Tensor? valid) -> (Tensor of, Tensor size)")


def _groups(segment: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(group of each unit [T], valid units in each [count]). An op, because the count is read from the data."""
    segment = segment.to(torch.int64)
    found = torch.unique(segment if valid is None else segment[valid])
    if not found.numel():
        found = segment.new_zeros(1)
    of = torch.searchsorted(found, segment.contiguous()).clamp_max(found.shape[0] - 1)
    counted = torch.ones_like(of) if valid is None else valid.to(torch.int64)
    return of, torch.zeros_like(found).scatter_add_(0, of, counted)


_LIBRARY.impl("groups_of_segments", _groups, "CompositeExplicitAutograd")


@torch.library.register_fake("moestro::groups_of_segments")
def _(segment: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    of = torch.empty_like(segment, dtype=torch.int64)
    return of, of.new_empty(torch.library.get_ctx().new_dynamic_size(min=1))


@overload
def share(factor: float, units: int, experts: int, *, up: bool) -> int: ...
@overload
def share(factor: float, units: Tensor, experts: int, *, up: bool) -> Tensor: ...
def share(factor: float, units: int | Tensor, experts: int, *, up: bool) -> int | Tensor:
    """factor * units / experts, rounded up or down, exactly: the factor is read as a decimal fraction of six digits.

    In floating point 1.1 * 10 / 11 rounds up to 2.
    """
    if not 0 < factor < 1e6:
        raise UserError(f"capacity_factor {factor} is not a positive number below a million")
    exact = Fraction(str(float(factor))).limit_denominator(1_000_000)
    above, below = exact.numerator * units, exact.denominator * experts
    return -((-above) // below) if up else above // below
