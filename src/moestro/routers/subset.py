"""A router that addresses some experts of a bank: it scores local ids 0..n-1; plans speak of the bank's ids."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import UserError
from .steps import Scores

__all__ = ["ABSENT_LOGIT", "Subset"]

ABSENT_LOGIT = -1e9  # of experts the router does not address: probability 0, and no infinity in anybody's gradient
_FILL = {"noisy_logits": ABSENT_LOGIT, "noise_std": 1.0}


class Subset:
    """The map between local and bank ids. Without a subset every method returns what it is given.

    Virtual ids follow the real ones in both numberings. Tables are Python lists that become tensors where they are
    used: buffers would be lost when a model is built on the meta device.
    """

    def __init__(self, ids: tuple[int, ...] | None, num_experts: int, num_virtual: int) -> None:
        self.ids = ids
        self.num_experts, self.num_virtual = num_experts, num_virtual
        self.num_local = num_experts if ids is None else len(ids)
        if ids is None:
            return
        if not ids or len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= num_experts:
            raise UserError(f"Router.subset must name different experts in 0..{num_experts - 1}, not {ids}")
        self._bank = [*ids, *range(num_experts, num_experts + num_virtual)]
        self._local = [-1] * (num_experts + num_virtual)
        for i, b in enumerate(self._bank):
            self._local[b] = i

    def _index(self, count: int, like: Tensor) -> Tensor:
        return torch.tensor(self._bank[:count], device=like.device)

    def to_bank(self, expert: Tensor) -> Tensor:
        """Local ids as bank ids; -1 stays -1 (it reads the last entry of the table)."""
        return expert if self.ids is None else torch.tensor([*self._bank, -1], device=expert.device)[expert]

    def to_local(self, expert: Tensor) -> Tensor:
        if self.ids is None:
            return expert
        local = torch.tensor([*self._local, -1], device=expert.device)[expert]
        if not expert.is_meta and bool(((local < 0) & (expert >= 0)).any()):
            raise UserError(f"cannot replay: the plan uses experts outside of this router's subset {self.ids}")
        return local

    def narrow(self, counts: Tensor) -> Tensor:
        """[E] of the bank -> those of the addressed experts."""
        return counts if self.ids is None else counts[self._index(self.num_local, counts)]

    def local_rows(self, table: Tensor) -> Tensor:
        """[G, E, C] -> [G, n, C]."""
        return table if self.ids is None else table.index_select(1, self._index(self.num_local, table))

    def spread(self, table: Tensor, dim: int, fill: float) -> Tensor:
        """A table with one entry per local id along `dim`, as one with an entry per bank id."""
        if self.ids is None:
            return table
        shape = list(table.shape)
        index = self._index(shape[dim], table)
        shape[dim] = self.num_experts + (shape[dim] - self.num_local)
        return torch.full(shape, fill, dtype=table.dtype, device=table.device).index_copy(dim, index, table)

    def spread_scores(self, scores: Scores) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """probs, logits and extras over the bank's ids."""
        if self.ids is None:
            return scores.probs, scores.logits, dict(scores.extra)
        extra = {n: self.spread(t, 1, _FILL.get(n, 0.0)) for n, t in scores.extra.items()}
        return self.spread(scores.probs, 1, 0.0), self.spread(scores.logits, 1, ABSENT_LOGIT), extra
