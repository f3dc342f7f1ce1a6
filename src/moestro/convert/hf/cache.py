"""Our carry as a cache of transformers: what `generate` hands from one token to the next, and reorders for beams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from transformers.cache_utils import Cache

from ...core.carry import Carry
from ...core.errors import UserError
from ...core.pytree import changed

__all__ = ["MoestroCache"]


class MoestroCache(Cache):
    """States of all mixers of one decoder (`Decoder.new_cache`), and how many tokens they have seen.

    Room is made as it is needed, at least doubled each time, up to the context. Only what belongs to a mixer is kept
    between calls; router state that flows through the layers starts anew with each.
    """

    def __init__(self, decoder: Any, capacity: int | None = None) -> None:
        super().__init__(layers=[])
        self.context: int = decoder.config.context
        self._new: Callable[[int], Carry] = decoder.new_cache
        self._first = min(self.context, 64 if capacity is None else max(1, capacity))
        self.reset()

    def reset(self) -> None:
        self.length, self.capacity = 0, self._first
        self.carry = self._new(self.capacity)

    def room(self, tokens: int) -> Carry:
        """The carry for a pass over so many more tokens. Raises `UserError` where the context is full."""
        needed = self.length + tokens
        if needed > self.context:
            raise UserError(f"{needed} tokens do not fit the model's context of {self.context}")
        if needed > self.capacity:
            self.capacity = min(self.context, max(needed, 2 * self.capacity))
            self.carry = self._states(lambda state: _grown(state, self.capacity))
        return self.carry

    def put(self, after: Carry, tokens: int) -> None:
        """Keep what a pass over so many tokens returned."""
        self.carry, self.length = Carry(own=after.own), self.length + tokens

    # What transformers asks a cache -----------------------------------------------------------------------------

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError("MoestroCache belongs to MoestroForCausalLM; other models make a cache of their own")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.context

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def __len__(self) -> int:
        return len(self.carry.own)

    def __repr__(self) -> str:
        return f"MoestroCache(length={self.length}, capacity={self.capacity}, context={self.context})"

    @property
    def batch_size(self) -> int:
        found = [leaf.shape[0] for leaf in _pytree.tree_leaves(self.carry) if isinstance(leaf, Tensor)]
        return found[0] if found else -1

    @property
    def is_initialized(self) -> bool:
        return self.length > 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether states can be put back by any number of tokens: where nothing is ever forgotten."""
        return all(_crops(state) for state in self.carry.own.values())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens. Raises `UserError` for mixers that cannot (windows, recurrences)."""
        if not tokens_to_remove:
            return
        if not self.is_croppable:
            raise UserError(
                "a state of this model cannot be put back by some tokens (a window, a recurrence); generate without "
                "an assistant model or prompt lookup"
            )
        n = abs(tokens_to_remove)
        self.carry = self._states(lambda s: changed(s, length=s.length - n, held=s.held - n))
        self.length -= n

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._tensors(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._tensors(lambda t: t.repeat_interleave(repeats, dim=0))

    # ------------------------------------------------------------------------------------------------------------

    def _states(self, change: Callable[[Any], Any]) -> Carry:
        return Carry(own={path: change(state) for path, state in self.carry.own.items()})

    def _tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            self.carry = _pytree.tree_map_only(Tensor, change, self.carry)


def _grown(state: Any, capacity: int) -> Any:
    return changed(state, capacity=capacity) if hasattr(state, "capacity") else state


def _crops(state: Any) -> bool:
    return hasattr(state, "held") and hasattr(state, "length") and state.held == state.length
