"""Shapes of expert parameters: checks, and the views of each expert's matrices."""

from __future__ import annotations

import itertools

from torch import Tensor

from ...core.errors import UserError
from ...core.rows import Rows

__all__ = ["Groups", "blocks", "check_few", "check_gated", "check_mixture", "check_mlp"]


class Groups:
    """Where each expert's rows lie: read from the device once, then plain numbers."""

    def __init__(self, offsets: Tensor, rows: int) -> None:
        bounds = offsets.tolist()
        self.counts = [stop - start for start, stop in itertools.pairwise(bounds)]
        self.end = bounds[-1]
        self._sizes = [*self.counts, rows - self.end]

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """[R, *] -> one view per expert."""
        return rows.split(self._sizes)[:-1]

    def tail(self, rows: Tensor) -> Tensor:
        """The rows after the last expert's, which belong to nobody."""
        return rows[self.end :]


def blocks(
    first: Tensor, down: Tensor, widths: tuple[int, ...] | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Views per expert: its first matrix [F or 2F, D] and its second as [F, D], in both layouts."""
    if widths is None:
        return first.unbind(0), down.transpose(1, 2).unbind(0)
    factor = first.shape[0] // max(1, sum(widths))
    return first.split([factor * f for f in widths]), down.split(list(widths))


def check_gated(
    what: str,
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    offsets: Tensor,
    widths: tuple[int, ...] | None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> None:
    """Raise `UserError` unless the shapes of a gated bank fit its rows."""
    _check(what, "gate_up", 2, rows, gate_up, down, offsets, widths)
    if widths is not None and (gate_up_bias is not None or down_bias is not None):
        raise UserError(f"{what}: experts of unequal widths have no biases; leave them out")
    _check_biases(what, ("gate_up_bias", gate_up_bias, gate_up), ("down_bias", down_bias, down))


def check_mlp(
    what: str,
    rows: Tensor,
    up: Tensor,
    down: Tensor,
    offsets: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    """Raise `UserError` unless the shapes of a plain bank fit its rows."""
    _check(what, "up", 1, rows, up, down, offsets, None)
    _check_biases(what, ("up_bias", up_bias, up), ("down_bias", down_bias, down))


def _check_biases(what: str, *pairs: tuple[str, Tensor | None, Tensor]) -> None:
    for name, bias, matrix in pairs:
        if bias is not None and bias.shape != matrix.shape[:2]:
            raise UserError(f"{what}: {name} must be {list(matrix.shape[:2])}, not {list(bias.shape)}")


def check_mixture(what: str, x: Tensor, weight: Tensor, index: Rows) -> None:
    """Raise `UserError` unless the weights and the units fit the index."""
    if x.shape[0] != index.num_units:
        raise UserError(f"{what}: the index is about {index.num_units} units, x has {x.shape[0]}")
    if weight.shape != index.inverse.shape:
        raise UserError(f"{what}: weight must be {list(index.inverse.shape)}, not {list(weight.shape)}")


def check_few(x: Tensor, expert: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """Raise `UserError` unless the shapes of a table of choices, its units and a gated bank fit."""
    E, F = gate_up.shape[0], down.shape[-1]
    T, D = x.shape if x.ndim == 2 else (-1, -1)
    K = expert.shape[-1]
    if gate_up.shape != (E, 2 * F, D) or down.shape != (E, D, F) or expert.shape != (T, K) or weight.shape != (T, K):
        raise UserError(
            f"gated_few: x {list(x.shape)}, expert {list(expert.shape)}, weight {list(weight.shape)}, gate_up "
            f"{list(gate_up.shape)} and down {list(down.shape)} do not fit; wanted [T, D], [T, K], [T, K], [E, 2F, D] "
            "and [E, D, F]"
        )


def _check(
    what: str,
    name: str,
    factor: int,
    rows: Tensor,
    first: Tensor,
    down: Tensor,
    offsets: Tensor,
    widths: tuple[int, ...] | None,
) -> None:
    D = rows.shape[-1]
    if rows.ndim != 2:
        raise UserError(f"{what}: rows must be [R, D], not {list(rows.shape)}")
    if widths is None:
        E = first.shape[0]
        F = down.shape[-1]
        want_first, want_down = [E, factor * F, D], [E, D, F]
    else:
        E, total = len(widths), sum(widths)
        want_first, want_down = [factor * total, D], [total, D]
    if list(first.shape) != want_first or list(down.shape) != want_down:
        raise UserError(
            f"{what}: {name} {list(first.shape)} and down {list(down.shape)} do not fit rows of width {D}; "
            f"expected {want_first} and {want_down}"
        )
    if tuple(offsets.shape) != (E + 1,):
        raise UserError(f"{what}: {E} experts need {E + 1} offsets, not {list(offsets.shape)}")
